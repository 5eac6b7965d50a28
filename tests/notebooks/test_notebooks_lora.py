"""A LoRA behind the name of a model: any notebook fuses it, and its record says so."""

from __future__ import annotations

import hashlib

import pytest
import torch
from safetensors.torch import save_file

from wanlab.models import get
from wanlab.models.networks import parameter_names, skeleton
from wanlab.runs.prepare import weights_id
from wanlab.runs.results import read_run

pytestmark = pytest.mark.notebook


@pytest.fixture(scope="module")
def lora(tmp_path_factory):
    """A LoRA of LightX2V's form for the attention of wan-nano's low-noise expert."""
    part = get("wan-nano").part("transformer_2")
    generator = torch.Generator().manual_seed(0)
    tensors: dict[str, torch.Tensor] = {}
    for name, like in parameter_names(skeleton(part)).items():
        if name.startswith("blocks.") and ".attn1.to_q.weight" in name:
            layer = f"diffusion_model.blocks.{name.split('.')[1]}.self_attn.q"
            tensors[f"{layer}.lora_down.weight"] = torch.randn(4, like.shape[1], generator=generator)
            tensors[f"{layer}.lora_up.weight"] = 0.02 * torch.randn(like.shape[0], 4, generator=generator)
            tensors[f"{layer}.alpha"] = torch.tensor(8.0)
    path = tmp_path_factory.mktemp("lora") / "fast_low.safetensors"
    save_file(tensors, path)
    return path


def test_a_notebook_runs_with_a_lora_and_says_so(run_notebook, lora):
    settings = {"height": 64, "width": 64, "frames": 5, "steps": 2, "guidance_scale": 1.0, "iterations": 1}
    options = [text for name, value in settings.items() for text in ("-p", f"{name}={value}")]
    done = run_notebook("10_baseline", "-p", f"model=wan-nano+{lora}@expert_low:0.5", *options)
    blocks = get("wan-nano").part("transformer_2").config["num_layers"]
    digest = hashlib.sha256(lora.read_bytes()).hexdigest()[:12]
    run = read_run(done.folder)
    assert (run.work.model, run.work.lora) == ("wan-nano", f"{digest}@expert_low:0.5")
    forwards = {result.work.component: result.work.lora for result in run.results if result.work.component}
    assert forwards["expert_low"] == run.work.lora
    assert forwards["expert_high"] is None
    assert done.record["weights"] != weights_id("wan-nano")
    said = f"LoRA fast_low.safetensors ({digest}), strength 0.5, rank 4, alpha 8, fused into {blocks} tensors"
    assert f"expert_low: {said}" in done.record["notes"]
    assert said in done.page.get_text()
