"""A faster interpreter of Triton for the tests.

The interpreter replaces the functions of `triton.language` at each launch of a kernel, and again at each call of a
function by the kernel, which takes a third of its time and changes nothing: they are replaced until the launch ends.
"""

from typing import Any


def replace_language_once_for_a_launch() -> None:
    """Let the interpreter replace the functions of the language once for a launch and a module, where it is installed.

    Reference: `_patch_lang` in `triton/runtime/interpreter.py`.
    """
    try:
        from triton.runtime import interpreter
    except ImportError:  # as on macOS
        return
    executor, replaced = interpreter.GridExecutor.__call__, set[int]()

    def launch(self: Any, *arguments: Any, **options: Any) -> None:
        replaced.clear()
        executor(self, *arguments, **options)

    def call(self: Any, *arguments: Any, **options: Any) -> Any:
        module = id(self.fn.__globals__)
        if module not in replaced:
            interpreter._patch_lang(self.fn)
            replaced.add(module)
        try:
            return self.rewrite()(*arguments, **options)
        except Exception as error:
            raise interpreter.InterpreterError(repr(error)) from error

    interpreter.GridExecutor.__call__ = launch
    interpreter.InterpretedFunction.__call__ = call
