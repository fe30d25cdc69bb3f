"""Made the folders in tests/hooks/saes with SAELens 6.54.12: small autoencoders, and what SAELens computes with them.

SAELens requires an older transformer_lens than this project, so this ran in an environment of its own:
    pip install sae-lens==6.54.12 && python tests/hooks/make_saes.py
"""

from pathlib import Path

import torch
from sae_lens import SAE, __version__
from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
from sae_lens.saes.sae import SAEMetadata
from safetensors.torch import save_file

HERE = Path(__file__).parent / "saes"
SIZES = {"d_in": 32, "d_sae": 24}
SAES = {
    "standard": {"architecture": "standard"},
    "bfloat16": {"architecture": "standard", "dtype": "bfloat16"},
    "keeps_b_dec": {"architecture": "standard", "apply_b_dec_to_input": False},
    "layer_norm": {"architecture": "standard", "normalize_activations": "layer_norm"},
    "constant_norm": {"architecture": "jumprelu", "normalize_activations": "constant_norm_rescale"},
    "hook_z": {"architecture": "standard", "reshape_activations": "hook_z", "normalize_activations": "layer_norm"},
    "jumprelu": {"architecture": "jumprelu"},
    "topk": {"architecture": "topk", "k": 5},
    "topk_rescaled": {"architecture": "topk", "k": 5, "rescale_acts_by_decoder_norm": True},
    "gated": {"architecture": "gated"},
}


def shake(sae: torch.nn.Module, rng: torch.Generator) -> None:
    """Weights that make every part of an autoencoder matter."""
    with torch.no_grad():
        for name, p in sae.named_parameters():
            p.copy_(torch.randn(p.shape, generator=rng) * (0.3 if name.startswith("W") else 0.5))
            if name == "threshold":
                p.abs_()


def record(folder: Path, x: torch.Tensor) -> None:
    """What SAELens makes of x with the autoencoder that it reads from the folder."""
    with torch.no_grad():
        sae = SAE.load_from_disk(folder)
        features = sae.encode(x)
        out = {"x": x, "features": features, "decoded": sae.decode(features)}
    save_file({name: tensor.contiguous() for name, tensor in out.items()}, folder / "outputs.safetensors")


def main() -> None:
    """Write every folder."""
    assert __version__ == "6.54.12", __version__
    rng = torch.Generator().manual_seed(0)
    for name, options in SAES.items():
        hook = "blocks.1.attn.hook_z" if name == "hook_z" else "blocks.1.hook_resid_post"
        metadata = {"model_name": "tiny", "hook_name": hook}
        sae = SAE.from_dict({**SIZES, "metadata": metadata, **options})
        shake(sae, rng)
        sae.save_model(HERE / name)
        x = 2 * torch.randn(2, 5, SIZES["d_in"], generator=rng) + 0.5
        record(HERE / name, x.unflatten(-1, (4, 8)) if name == "hook_z" else x)
    save_file({"sparsity": -3 * torch.rand(SIZES["d_sae"], generator=rng)}, HERE / "standard" / "sparsity.safetensors")

    cfg = BatchTopKTrainingSAEConfig(**SIZES, k=4, metadata=SAEMetadata(hook_name="blocks.1.hook_resid_post"))
    training = BatchTopKTrainingSAE(cfg)
    shake(training, rng)
    training.topk_threshold.fill_(0.8)
    training.save_inference_model(HERE / "batchtopk")
    record(HERE / "batchtopk", 2 * torch.randn(2, 5, SIZES["d_in"], generator=rng))


if __name__ == "__main__":
    main()
