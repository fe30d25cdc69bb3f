"""Train LoRA adapters on a loaded model, whose weights stay packed and unchanged, and write PEFT's folders."""
