"""The tests mirror the tree: `workbench/model/cache.py` is tested by `tests/model/test_cache.py`."""

import re
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).parents[1]
# tests of several modules together, or of what is not a module of the workbench
ACROSS_MODULES = {
    "capture/test_damage.py",
    "capture/test_exact_records.py",
    "capture/test_excluding.py",
    "capture/test_faults.py",
    "capture/test_layer_experts.py",
    "capture/test_memory.py",
    "cli/test_cli.py",
    "cli/test_fuzz.py",
    "cli/test_fuzz_checkpoints.py",
    "cli/test_fuzz_commands.py",
    "cli/test_fuzz_formats.py",
    "cli/test_every_command.py",
    "cli/test_fuzz_runs.py",
    "cli/test_fuzzing.py",
    "cli/test_outputs.py",
    "data/test_interop.py",
    "data/test_nano.py",
    "figures/test_one_answer.py",
    "harmony/test_round_trip.py",
    "kernels/gpu/test_launches.py",
    "kernels/gpu/test_model.py",
    "model/test_checkpointing.py",
    "model/test_gradients.py",
    "model/test_hooks.py",
    "model/test_layer_experts.py",
    "model/test_lora_refusals.py",
    "model/test_parity.py",
    "model/test_paths.py",
    "model/test_synchronisation.py",
    "model/test_transformer_lens.py",
    "model/test_transformer_lens_habits.py",
    "notebooks/test_notebooks.py",
    "research/test_research.py",
    "runs/test_damage.py",
    "scripts/test_findings.py",
    "scripts/test_install_torch.py",
    "scripts/test_pictures.py",
    "studies/test_confounded_runs.py",
    "test_architecture.py",
    "test_deferred_packages.py",
    "test_docs.py",
    "test_docstrings.py",
    "test_howto.py",
    "live/test_leaving.py",
    "notebooks/test_jupyterlab.py",
    "test_howto_tasks.py",
    "test_language.py",
    "test_layout.py",
    "test_links.py",
    "test_packaging.py",
    "test_readme.py",
}

# modules without a test file of their own → the test file that tests them, which imports or names them
TESTED_BY = {
    "_deferred_packages": "test_deferred_packages.py",
    "_links": "test_links.py",
    "bench/autotune": "bench/test_gpu.py",
    "bench/cases": "bench/test_gpu.py",
    "bench/command": "bench/test_kernels.py",
    "bench/decode": "bench/test_cpu.py",
    "cli/page_export": "studies/test_feature_pages.py",
    "studies/feature_labels": "dashboards/test_features_page.py",
    "figures/feature_examples": "studies/test_feature_examples.py",
    "figures/neuron_examples": "studies/test_neuron_examples.py",
    "runs/feature_examples": "capture/test_feature_lists.py",
    "runs/neuron_examples": "capture/test_neuron_lists.py",
    **{
        f"kernels/gpu/compile_cases/{name}": "bench/test_kernels.py"
        for name in ("attention", "logits", "moe", "moments", "mxfp4", "norm", "rotary", "routing")
    },
    "kernels/gpu/spills": "kernels/gpu/test_launches.py",
    "bench/first_steps": "bench/test_first.py",
    "bench/models": "bench/test_gpu.py",
    "bench/worker": "bench/test_cpu.py",
    "capture/compute": "capture/test_host_routing.py",
    "capture/job_log": "capture/test_job.py",
    "capture/job_plan": "capture/test_job.py",
    "capture/own_record": "capture/test_recorder.py",
    "capture/pipeline": "capture/test_faults.py",
    "capture/sample": "capture/test_estimate.py",
    "capture/shape_model": "capture/test_estimate.py",
    "cli/finetuning": "cli/test_outputs.py",
    "cli/features": "experiments/test_feature_ablation.py",
    "cli/graphs": "experiments/test_graph_export.py",
    "cli/labels": "studies/test_expert_labels.py",
    "cli/live": "live/test_experiment.py",
    "cli/pipeline": "cli/test_cli.py",
    "cli/results": "cli/test_cli.py",
    "dashboards/feature_ablation": "dashboards/test_features_page.py",
    "dashboards/feature_details": "dashboards/test_features_page.py",
    "dashboards/example_lists": "dashboards/test_neurons_page.py",
    "dashboards/expert_sections": "dashboards/test_overview.py",
    "dashboards/frame_view": "dashboards/test_attention_page.py",
    "dashboards/heatmap_pages": "dashboards/test_app.py",
    "dashboards/results_pages": "dashboards/test_stored_results.py",
    "data/card": "data/test_nano.py",
    "data/command": "data/test_evaluate.py",
    "data/conversations": "data/test_tasks.py",
    "data/prompts": "data/test_evaluate.py",
    "experiments/activations": "experiments/test_gradients.py",
    "experiments/attention_knockout": "experiments/test_hidden_messages.py",
    "experiments/answer_effects": "experiments/test_generated_answers.py",
    "experiments/answer_measures": "experiments/test_generated_answers.py",
    "experiments/branch_answers": "experiments/test_sentence_importance.py",
    "experiments/branch_importance": "experiments/test_sentence_importance.py",
    "experiments/branching": "experiments/test_sentence_importance.py",
    "experiments/chain_of_thought": "experiments/test_registry.py",
    "experiments/expert_ablation": "experiments/test_registry.py",
    "experiments/expert_forcing": "experiments/test_registry.py",
    "experiments/expert_reweighting": "experiments/test_registry.py",
    "experiments/expert_sets": "experiments/test_random_controls.py",
    "experiments/final_channel": "experiments/test_random_controls.py",
    "experiments/from_run": "experiments/test_effects.py",
    "experiments/logit_attribution": "experiments/test_registry.py",
    "experiments/residual_attribution": "experiments/test_attribution.py",
    "experiments/sink_ablation": "experiments/test_registry.py",
    "figures/experiments": "figures/test_effects.py",
    "figures/expert_examples": "studies/test_expert_examples.py",
    "figures/expert_logits": "experiments/test_expert_logits.py",
    "figures/generated_answers": "experiments/test_generated_answers.py",
    "figures/jacobian_lens": "experiments/test_jacobian_lens.py",
    "figures/quick_look": "studies/test_quick_look.py",
    "figures/receiver_heads": "experiments/test_receiver_heads.py",
    "figures/sink_difference": "studies/test_sink_difference.py",
    "figures/risk_difference": "studies/test_risk_difference.py",
    "figures/sentence_importance": "experiments/test_sentence_importance.py",
    "harmony/chat_messages": "harmony/test_rendering.py",
    "harmony/message_fields": "harmony/test_reasoning.py",
    "harmony/formats/shapes": "harmony/test_formats.py",
    "harmony/grammar": "harmony/test_flags.py",
    "harmony/hosts/answers": "harmony/hosts/test_collect.py",
    "harmony/hosts/asker": "harmony/hosts/test_collect.py",
    "harmony/hosts/settings": "harmony/hosts/test_collect.py",
    "harmony/preamble": "harmony/test_rendering.py",
    "harmony/templates": "harmony/test_rendering.py",
    "hooks/activations": "hooks/test_interventions.py",
    "hooks/attention": "hooks/test_interventions.py",
    "hooks/edits": "hooks/test_interventions.py",
    "hooks/experts": "hooks/test_interventions.py",
    "hooks/observation": "hooks/test_interventions.py",
    "hooks/targets": "hooks/test_interventions.py",
    "kernels/cpu/ggml_loops": "kernels/test_ggml.py",
    "kernels/cpu/layer_records": "kernels/cpu/test_layer.py",
    "kernels/cpu/attention_loops": "kernels/cpu/test_layer.py",
    "kernels/cpu/expert_loops": "kernels/cpu/test_layer.py",
    "kernels/cpu/piece_loops": "kernels/cpu/test_layer.py",
    "kernels/cpu/row_loops": "kernels/cpu/test_layer.py",
    "kernels/cpu/integer_groups": "kernels/cpu/test_tiles.py",
    "kernels/cpu/dense_tile_loops": "kernels/cpu/test_tiles.py",
    "kernels/cpu/integer_tile_loops": "kernels/cpu/test_tiles.py",
    "kernels/cpu/tile_jobs": "kernels/cpu/test_tiles.py",
    "kernels/cpu/position_loops": "kernels/cpu/test_positions.py",
    "kernels/cpu/sequence_loops": "kernels/cpu/test_sequences.py",
    "kernels/cpu/slot_loops": "kernels/cpu/test_slots.py",
    "kernels/cpu/unpacking_loops": "kernels/cpu/test_loops.py",
    "kernels/cpu/vectors": "kernels/cpu/test_products.py",
    "kernels/cpu/threads": "kernels/cpu/test_products.py",
    "kernels/dispatch": "kernels/gpu/test_model.py",
    "kernels/gpu/aot": "kernels/gpu/test_launches.py",
    "kernels/gpu/attention_blocks": "model/test_synchronisation.py",
    "kernels/gpu/attention_gradient": "kernels/gpu/test_attention.py",
    "kernels/gpu/logits": "kernels/test_logits.py",
    "kernels/gpu/norm": "kernels/test_norm.py",
    "kernels/gpu/rotary": "kernels/test_rotary.py",
    "kernels/gpu/tiles": "bench/test_gpu.py",
    "kernels/moments": "kernels/gpu/test_moments.py",
    "live/arrangement": "live/test_app.py",
    "live/expert_map": "live/test_app.py",
    "live/model_server": "live/test_page.py",
    "live/recipe_card": "live/test_page.py",
    "live/result": "live/test_experiment.py",
    "model/activation_cache": "model/test_neuron_results.py",
    "model/config_fields": "model/test_config.py",
    "model/config_file": "model/test_config.py",
    "model/formats/gguf_file": "model/formats/test_gguf_reader.py",
    "model/info": "cli/test_models.py",
    "model/layers": "model/test_gradients.py",
    "model/lazy_tensors": "model/test_loading.py",
    "model/prompt_cache": "model/test_generation_loop.py",
    "model/safetensors_file": "model/test_opened_checkpoint.py",
    "model/transformer": "model/test_transformer_lens.py",
    "research/answers": "research/test_research.py",
    "research/directions": "research/test_research.py",
    "research/probes": "research/test_research.py",
    "research/recipe_python": "research/test_recipe.py",
    "research/top_experts": "research/test_research.py",
    "runs/committed": "runs/test_reader.py",
    "runs/expected_files": "runs/test_checksums.py",
    "runs/manifest": "runs/test_damage.py",
    "runs/schema": "runs/test_writer.py",
    "runs/summed": "runs/test_totals.py",
    "runs/views": "research/test_research.py",
    "studies/contrast_summary": "studies/test_contrast.py",
    "studies/compare_efforts": "studies/test_compare.py",
    "studies/comparison": "studies/test_divergence.py",
    "studies/label_files": "studies/test_expert_labels.py",
    "studies/label_proposals": "studies/test_expert_labels.py",
    "studies/layer_experts": "capture/test_layer_experts.py",
    "studies/routing_agreement": "capture/test_host_routing.py",
    "studies/routing_agreement_runs": "capture/test_host_routing.py",
    "research/intervention": "research/test_recipe.py",
    "research/intervention_edits": "research/test_recipe.py",
    "studies/selection_rates": "studies/test_risk_difference.py",
    "studies/probe_folds": "studies/test_label_probes.py",
    "studies/synthetic": "studies/test_routing.py",
    "studies/token_labels": "studies/test_label_probes.py",
}


def strays(tests: Iterable[str], modules: set[str]) -> list[str]:
    """Tests that neither have the path of a module or package nor are listed above."""
    stray = []
    for test in sorted(set(tests) - ACROSS_MODULES):
        folder, _, name = test.rpartition("/")
        subject = f"{folder}/{name}".strip("/").replace("test_", "", 1).removesuffix(".py")
        subject = subject.removesuffix("init").rstrip("/") if name == "test_init.py" else subject
        if subject not in modules:
            stray.append(test)
    return stray


def test_every_test_has_the_path_of_what_it_tests() -> None:
    workbench = ROOT / "workbench"
    paths = [p for part in workbench.iterdir() for p in ([part] if part.suffix == ".py" else part.rglob("*.py"))]
    modules = {str(p.relative_to(workbench).with_suffix("")) for p in paths}
    modules |= {str(p.parent.relative_to(workbench)) for p in paths}
    tests = [str(p.relative_to(ROOT / "tests")) for p in (ROOT / "tests").rglob("test_*.py")]
    assert strays(tests, modules) == []


def modules_of(workbench: Path) -> set[str]:
    """Paths of the modules of the workbench without their suffix; packages and what starts a command have no test."""
    paths = [p for part in workbench.iterdir() for p in ([part] if part.suffix == ".py" else part.rglob("*.py"))]
    plain = [p for p in paths if not p.name.startswith("__")]
    return {p.relative_to(workbench).with_suffix("").as_posix() for p in plain}


def mirrored(module: str) -> str:
    """Return the path of the test file of a module."""
    folder, _, name = module.rpartition("/")
    return f"{folder}/test_{name}.py".lstrip("/")


def names_module(module: str, source: str) -> bool:
    """Return whether the source of a test imports a module or has its full name."""
    dotted = "workbench." + module.replace("/", ".")
    package, _, name = dotted.rpartition(".")
    imported = re.findall(rf"from {re.escape(package)} import (\([^)]*\)|[^\n]*)", source)
    return bool(re.search(rf"{re.escape(dotted)}\b", source)) or any(
        re.search(rf"\b{name}\b", names) for names in imported
    )


def untested(modules: Iterable[str], tests: dict[str, str], tested_by: dict[str, str]) -> list[str]:
    """Modules that neither have a test file of their own nor are named in the one that is listed for them.

    tests: the source of every test file. An entry of the list for a module that is not there, or that has a file of
    its own, is wrong, too.
    """
    modules = set(modules)
    wrong = sorted(module for module in tested_by if module not in modules or mirrored(module) in tests)
    for module in sorted(modules - set(wrong)):
        listed = tested_by.get(module)
        if mirrored(module) not in tests and (listed not in tests or not names_module(module, tests[listed])):
            wrong.append(module)
    return wrong


def test_every_module_is_tested_by_its_own_file_or_by_the_listed_one() -> None:
    folder = ROOT / "tests"
    tests = {p.relative_to(folder).as_posix(): p.read_text("utf-8") for p in folder.rglob("test_*.py")}
    assert untested(modules_of(ROOT / "workbench"), tests, TESTED_BY) == []


def test_an_untested_module_is_found() -> None:
    tests = {"a/test_b.py": "", "a/test_all.py": "from workbench.a import (\n    c,\n    d,\n)\n", "test_e.py": ""}
    assert untested(["a/b", "a/c", "e"], tests, {"a/c": "a/test_all.py"}) == []
    assert untested(["a/b", "a/c"], tests, {}) == ["a/c"]
    assert untested(["a/x", "a/c"], tests, {"a/x": "a/test_all.py", "a/c": "a/test_none.py"}) == ["a/c", "a/x"]
    assert untested(["a/b"], tests, {"a/b": "a/test_all.py", "a/old": "a/test_all.py"}) == ["a/b", "a/old"]


def test_a_stray_test_is_found() -> None:
    modules = {"model/cache", "model"}
    tests = ["model/test_cache.py", "model/test_init.py", "model/test_cash.py", "test_docs.py", "cache/test_model.py"]
    assert strays(tests, modules) == ["cache/test_model.py", "model/test_cash.py"]


def unformatted(text: str) -> int:
    """Return how many statements of a source the formatter is told to leave alone."""
    return len(re.findall(r"#\s*fmt:\s*(?:skip|off)", text))


def test_only_kernels_keep_their_own_format() -> None:
    folders = ("workbench", "hooks", "dashboards", "data", "tests", "notebooks", "scripts")
    paths = [p for folder in folders for p in (ROOT / folder).rglob("*.py") if p != Path(__file__)]
    kernels = (ROOT / "workbench" / "kernels", ROOT / "kernels")
    assert [
        str(p) for p in paths if unformatted(p.read_text("utf-8")) and not any(map(p.is_relative_to, kernels))
    ] == []
    assert unformatted("x = 1  # fmt: skip\n# fmt: off\n") == 2
