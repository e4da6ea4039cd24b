"""Small models that a stack must train: one double and two single blocks of FLUX.1, a LoRA on attention.

Run in the venv of a stack, or of a skewed one, by `benchmarks/stack_report.py` and `tests/test_skews.py`.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import torch


def flux():
    from diffusers import FluxPipeline, FluxTransformer2DModel  # noqa: F401  the pipeline's import is half of the probe

    torch.manual_seed(0)
    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        guidance_embeds=True,
        axes_dims_rope=(4, 4, 8),
    )


def batch(dtype=torch.float32):
    g = torch.Generator().manual_seed(1)
    x, text, pooled, target = (
        torch.randn(s, generator=g).to(dtype) for s in [(2, 16, 4), (2, 8, 32), (2, 32), (2, 16, 4)]
    )
    t = torch.tensor([0.2, 0.8], dtype=dtype)
    return target, {
        "hidden_states": x,
        "encoder_hidden_states": text,
        "pooled_projections": pooled,
        "timestep": t,
        "guidance": torch.ones_like(t),
        "img_ids": torch.zeros(16, 3, dtype=dtype),
        "txt_ids": torch.zeros(8, 3, dtype=dtype),
        "return_dict": False,
    }


def lora():
    from peft import LoraConfig

    model = flux()
    model.requires_grad_(False)
    model.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    return model, [p for p in model.parameters() if p.requires_grad]


def falling(losses):
    assert losses[-1] < losses[0], losses
    return f"loss {losses[0]:.4f} -> {losses[-1]:.4f}"


def lora_steps():
    from accelerate import Accelerator

    model, trained = lora()
    accelerator = Accelerator(cpu=True)
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(trained, lr=1e-2))
    target, inputs = batch()
    losses = []
    for _ in range(6):
        loss = (model(**inputs)[0] - target).square().mean()
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    return falling(losses)


def encoders():
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    ids = torch.ones(1, 4, dtype=torch.long)
    T5EncoderModel(T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2))(ids)
    CLIPTextModel(
        CLIPTextConfig(
            vocab_size=64,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            bos_token_id=0,
            eos_token_id=1,
        )
    )(ids)


def tokenizer():
    import sentencepiece
    from transformers import T5TokenizerFast

    with tempfile.TemporaryDirectory() as folder:
        lines = "".join(f"a photo of a small fox in snow {i}\n" for i in range(200))
        Path(folder, "text").write_text(lines)
        sentencepiece.SentencePieceTrainer.train(
            input=f"{folder}/text",
            model_prefix=f"{folder}/spiece",
            vocab_size=40,
            pad_id=0,
            eos_id=1,
            unk_id=2,
            bos_id=-1,
            minloglevel=2,
        )
        found = T5TokenizerFast.from_pretrained(folder)  # a sentencepiece file: read through protobuf
        text = "a photo of a fox"
        assert found.decode(found(text)["input_ids"], skip_special_tokens=True).strip() == text


def quanto():
    from optimum.quanto import freeze, qfloat8, qint8, quantize

    _, inputs = batch()
    for kind in (qint8, qfloat8):
        model = flux()
        exact = model(**inputs)[0]
        quantize(model, weights=kind)
        freeze(model)
        assert 0 < float((model(**inputs)[0] - exact).detach().abs().max()) < 1


def tensorboard():
    from torch.utils.tensorboard import SummaryWriter

    with tempfile.TemporaryDirectory() as folder:
        with SummaryWriter(folder) as writer:
            writer.add_scalar("loss", 1.0, 0)
            writer.add_image("sample", torch.zeros(3, 4, 4), 0)
        assert list(Path(folder).iterdir())


def zero2():
    """Two ranks on gloo: train, save, load."""
    with tempfile.TemporaryDirectory() as folder:
        argv = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", __file__, folder]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0 and "loss" in done.stdout, done.stdout + done.stderr
    return next(line for line in done.stdout.splitlines() if line.startswith("loss"))


def rank(folder):
    import deepspeed

    deepspeed.init_distributed(dist_backend="gloo")
    model, trained = lora()
    settings = {
        "train_micro_batch_size_per_gpu": 2,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 2},
        "zero_allow_untested_optimizer": True,
    }
    engine, *_ = deepspeed.initialize(
        model=model, model_parameters=trained, config=settings, optimizer=torch.optim.AdamW(trained, lr=1e-2)
    )
    target, inputs = batch(torch.bfloat16)
    losses = []
    for _ in range(4):
        loss = (engine(**inputs)[0] - target).square().mean()
        engine.backward(loss)
        engine.step()
        losses.append(float(loss))
    engine.save_checkpoint(folder, tag="t")
    path, _ = engine.load_checkpoint(folder, tag="t")
    assert path
    if torch.distributed.get_rank() == 0:
        print(falling(losses), flush=True)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    rank(sys.argv[1])
