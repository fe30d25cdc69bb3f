"""Random models of odd shapes, and the same weights in transformers' own implementation."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import GptOssConfig, GptOssForCausalLM

from workbench.model.config import Config, Rope
from workbench.model.transformer import GptOss

YARN = Rope(theta=150_000.0, factor=32.0, beta_fast=32.0, beta_slow=1.0, original_ctx=4096, truncate=False)
BASE = Config(
    d_model=64,
    n_layers=3,
    n_heads=8,
    n_key_value_heads=1,
    d_head=16,
    d_mlp=96,
    d_vocab=101,
    num_experts=8,
    experts_per_token=4,
    windows=(16, None, 16),
    n_ctx=512,
    eps=1e-5,
    swiglu_limit=7.0,
    swiglu_alpha=1.702,
    rope=YARN,
)
SHAPES = {
    "ratio 8": BASE,
    "ratio 1, 5 experts": replace(BASE, n_heads=3, n_key_value_heads=3, num_experts=5, experts_per_token=3),
    "ratio 3, d_head 24": replace(BASE, n_heads=6, n_key_value_heads=2, d_head=24, windows=(33, None, 33)),
    "short yarn, truncated": replace(
        BASE, rope=replace(YARN, theta=10_000.0, factor=4.0, original_ctx=128, truncate=True)
    ),
    "top-1, window 1": replace(BASE, experts_per_token=1, windows=(1, None, 1), swiglu_limit=1.5),
}


def hf_config(cfg: Config) -> GptOssConfig:
    window = next((w for w in cfg.windows if w is not None), None)
    rope = cfg.rope
    return GptOssConfig(
        num_hidden_layers=cfg.n_layers,
        hidden_size=cfg.d_model,
        intermediate_size=cfg.d_mlp,
        vocab_size=cfg.d_vocab,
        num_local_experts=cfg.num_experts,
        num_experts_per_tok=cfg.experts_per_token,
        head_dim=cfg.d_head,
        num_attention_heads=cfg.n_heads,
        num_key_value_heads=cfg.n_key_value_heads,
        sliding_window=window,
        max_position_embeddings=cfg.n_ctx,
        rms_norm_eps=cfg.eps,
        swiglu_limit=cfg.swiglu_limit,
        layer_types=["full_attention" if w is None else "sliding_attention" for w in cfg.windows],
        rope_parameters=dict(
            rope_type="yarn",
            rope_theta=rope.theta,
            factor=rope.factor,
            beta_fast=rope.beta_fast,
            beta_slow=rope.beta_slow,
            original_max_position_embeddings=rope.original_ctx,
            truncate=rope.truncate,
        ),
        attn_implementation="eager",
    )


def to_hf(model: GptOss, dtype: torch.dtype = torch.float32) -> GptOssForCausalLM:
    """transformers' implementation on our weights."""
    hf = GptOssForCausalLM._from_config(hf_config(model.cfg), torch_dtype=dtype).eval()
    names = {
        "embed.weight": "model.embed_tokens.weight",
        "unembed.weight": "lm_head.weight",
        "ln_final.weight": "model.norm.weight",
    }
    parts = [
        ("ln1.", "input_layernorm."),
        ("ln2.", "post_attention_layernorm."),
        ("attn.sinks", "self_attn.sinks"),
        *((f"attn.{p}.", f"self_attn.{p}_proj.") for p in "qkvo"),
        ("mlp.router.", "mlp.router."),
        ("mlp.experts.gate_up.weight", "mlp.experts.gate_up_proj"),
        ("mlp.experts.down.weight", "mlp.experts.down_proj"),
        ("mlp.experts.gate_up.bias", "mlp.experts.gate_up_proj_bias"),
        ("mlp.experts.down.bias", "mlp.experts.down_proj_bias"),
    ]
    state = {}
    for name, tensor in model.state_dict().items():
        if name not in names:
            ours, theirs = next((a, b) for a, b in parts if name.split(".", 2)[2].startswith(a))
            names[name] = "model.layers." + name.split(".")[1] + "." + name.split(".", 2)[2].replace(ours, theirs)
        state[names[name]] = tensor.to(dtype)
    hf.load_state_dict(state)
    return hf


@torch.no_grad()
def random_model(cfg: Config, seed: int = 0) -> GptOss:
    """Weights loud enough that gates clamp, sinks matter and routing varies."""
    model = GptOss(cfg).reset_parameters(seed)
    rng = torch.Generator().manual_seed(seed + 1)
    for name, p in model.named_parameters():
        if name.endswith("sinks"):
            p.normal_(1.0, 1.0, generator=rng)
        elif name.endswith("bias"):
            p.normal_(0, 0.5, generator=rng)
        elif "ln" in name:
            p.normal_(1.0, 0.2, generator=rng)
        elif "gate_up.weight" in name:
            p.mul_(3.0)
    return model.eval()


@pytest.fixture(scope="session", params=list(SHAPES))
def model(request: pytest.FixtureRequest) -> GptOss:
    return random_model(SHAPES[request.param])


@pytest.fixture(scope="session")
def tokens() -> Callable[[Config], torch.Tensor]:
    def make(cfg: Config, batch: int = 2, pos: int = 90) -> torch.Tensor:
        return torch.randint(cfg.d_vocab, (batch, pos), generator=torch.Generator().manual_seed(5))

    return make


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two shards and an index."""
    from tests.model.checkpoints import write  # late: it imports this module

    folder = write(tmp_path_factory.mktemp("checkpoint") / "hf", shard_bytes=90_000)
    assert len(list(folder.glob("*.safetensors"))) > 1
    return folder


@pytest.fixture
def folder(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "copy"))


@pytest.fixture(scope="session")
def adapted_models() -> tuple[GptOss, GptOss]:
    """The model that adapters are loaded into, packed and dense; tests unload what they load."""
    from tests.model.adapters import SHAPE, dense_and_packed

    return dense_and_packed(SHAPES[SHAPE])


@pytest.fixture(scope="session")
def adapter_folders(
    adapted_models: tuple[GptOss, GptOss], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Path, Tensor]]:
    """PEFT's folder of each adapter, and the logits of transformers with it."""
    from tests.model.adapters import TARGETS, save_adapter

    made = {}
    for name, (modules, parameters) in TARGETS.items():
        folder = tmp_path_factory.mktemp("adapters") / name
        made[name] = folder, save_adapter(folder, adapted_models[1], modules, parameters)
    return made
