"""`workbench info` prints sizes and hook points, and plans published shapes without their weights.

Also tests `workbench.model.info`.
"""

from tests.cli.running import run_command


def test_info_names_sizes_and_hook_points() -> None:
    text = run_command("info", "nano").out
    for word in ("attn.hook_sink", "batch pos slot d_mlp", "parameters", "experts_per_token"):
        assert word in text


def test_info_plans_a_published_shape_without_its_weights() -> None:
    text = run_command("info", "120b", "--tokens", "1024", "--batch", "2").out
    assert "65,248,815,744" in text  # 60.8 GiB, as published
    assert "This plan needs 1 such device: 65.400 GB of weights and cache" in text
    text = run_command("info", "120b", "--memory", "24GB").out
    assert "One device of 24.000 GB does not hold it: the weights alone are 65.249 GB." in text
    assert "This plan needs 3 such devices" in text
    text = run_command("info", "120b", "--memory", "2GB").out
    assert "No number of devices of 2.000 GB does this plan" in text


def test_info_plans_what_is_recorded() -> None:
    def records(*options: str) -> int:
        text = run_command("info", "20b", *options).out
        return int(
            next(line for line in text.splitlines() if "records of a unit" in line).split("│")[2].replace(",", "")
        )

    assert records("--record", "sinks") == 2 * 16_384 * 24 * 64 * 2
    assert records("--record", "resid_post:3,7", "--unit-tokens", "1024") == 2 * 1024 * 2 * 2880 * 2
