#!/usr/bin/env bash
# Install the stacks of compat_matrix.yaml from their indexes, import everything, train small models on CPU ranks.
#
#   benchmarks/stacks.sh [NAME ...]    these stacks (all): one venv each, a table, benchmarks/results/stack-NAME-pyX.Y.json
#   benchmarks/stacks.sh breaks        lay each known bad version over a stack and look for the error that the rule quotes
#
#   PYTHON        interpreter of the venvs (python3)
#   XFLUX_DOCTOR  the doctor's command (.venv/bin/xflux-doctor)
#   WORK          where the venvs go (a new temporary folder, removed at the end)
# A stack takes 1 to 6 GB and some minutes. No GPU is used. Exit 1 when any step fails.
set -eu
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
doctor=${XFLUX_DOCTOR:-.venv/bin/xflux-doctor}
results=$PWD/benchmarks/results
work=${WORK:-}
if [ -z "$work" ]; then
    work=$(mktemp -d)
    trap 'rm -rf "$work"' EXIT
fi
mkdir -p "$results" "$work"
export CUDA_VISIBLE_DEVICES="" DS_ACCELERATOR=cpu OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" TOKENIZERS_PARALLELISM=false

cat >"$work/toys.py" <<'PYTHON'
"""Small models that the probes below train: one double and two single blocks of FLUX.1, a LoRA on attention."""
import os
import subprocess
import sys
import tempfile
import torch

def flux():
    from diffusers import FluxPipeline, FluxTransformer2DModel  # noqa: F401  the pipeline's import is half of the probe
    torch.manual_seed(0)
    return FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, guidance_embeds=True, axes_dims_rope=(4, 4, 8))

def batch(dtype=torch.float32):
    g = torch.Generator().manual_seed(1)
    x, text, pooled, target = (torch.randn(s, generator=g).to(dtype) for s in [(2, 16, 4), (2, 8, 32), (2, 32), (2, 16, 4)])
    t = torch.tensor([0.2, 0.8], dtype=dtype)
    return target, dict(hidden_states=x, encoder_hidden_states=text, pooled_projections=pooled, timestep=t,
                        guidance=torch.ones_like(t), img_ids=torch.zeros(16, 3, dtype=dtype),
                        txt_ids=torch.zeros(8, 3, dtype=dtype), return_dict=False)

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
    CLIPTextModel(CLIPTextConfig(vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                                 num_attention_heads=2, bos_token_id=0, eos_token_id=1))(ids)

def tokenizer():
    import sentencepiece
    from transformers import T5TokenizerFast
    with tempfile.TemporaryDirectory() as folder:
        with open(f"{folder}/text", "w") as file:
            file.writelines(f"a photo of a small fox in snow {i}\n" for i in range(200))
        sentencepiece.SentencePieceTrainer.train(input=f"{folder}/text", model_prefix=f"{folder}/spiece", vocab_size=40,
                                                 pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2)
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
        assert os.listdir(folder)

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
    settings = {"train_micro_batch_size_per_gpu": 2, "bf16": {"enabled": True}, "zero_optimization": {"stage": 2},
                "zero_allow_untested_optimizer": True}
    engine, *_ = deepspeed.initialize(model=model, model_parameters=trained, config=settings,
                                      optimizer=torch.optim.AdamW(trained, lr=1e-2))
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
PYTHON

cat >"$work/stack.py" <<'PYTHON'
"""In a stack's venv: import every pinned package, run every toy. argv: name, build of torch, requirements file, result file."""
import datetime
import importlib
import json
import platform
import sys
import time
from importlib.metadata import distributions

name, build, requirements, result = sys.argv[1:]
pins = dict(line.strip().split("==") for line in open(requirements) if "==" in line and line[0].isalnum())
modules = {"huggingface-hub": "huggingface_hub", "optimum-quanto": "optimum.quanto", "pillow": "PIL",
           "protobuf": "google.protobuf", "py-cpuinfo": "cpuinfo"}
steps = {}

def step(title, act):
    begin = time.perf_counter()
    try:
        said, ok = act(), True
    except Exception as error:
        said, ok = f"{type(error).__name__}: {str(error)[-600:]}", False
    steps[title] = {"ok": ok, "seconds": round(time.perf_counter() - begin, 1), "said": said if isinstance(said, str) else ""}
    print(f"{'ok  ' if ok else 'FAIL'} {steps[title]['seconds']:6.1f} s  {title:<28} {steps[title]['said']}", flush=True)

for package in pins:
    step(f"import {package}", lambda: importlib.import_module(modules.get(package, package)) and None)
sys.path.insert(0, sys.argv[0].rsplit("/", 1)[0])
import toys  # noqa: E402
import torch  # noqa: E402

def is_build():
    assert torch.__version__.endswith(f"+{build}"), f"torch {torch.__version__}; the stack has {build}"
    return torch.__version__

step("torch's build", is_build)
for toy in ("encoders", "tokenizer", "lora_steps", "quanto", "tensorboard", "zero2"):
    step(toy, getattr(toys, toy))
nccl = torch.distributed.is_nccl_available()
seen = {
    "stack": name, "date": datetime.date.today().isoformat(), "python": platform.python_version(),
    "torch": torch.__version__, "cuda": torch.version.cuda, "gpu_archs": (torch._C._cuda_getArchFlags() or "").split()
    if torch.version.cuda else [], "nccl": ".".join(map(str, torch.cuda.nccl.version())) if nccl else None,
    "cudnn": torch.backends.cudnn.version() if torch.version.cuda else None, "steps": steps,
    "packages": dict(sorted((d.metadata["Name"], d.version) for d in distributions())),
}
json.dump(seen, open(result, "w"), indent=1)
print(f"{name}: Python {seen['python']}, torch {seen['torch']}, NCCL {seen['nccl']}, cuDNN {seen['cudnn']}, "
      f"{' '.join(seen['gpu_archs']) or 'no cubins'}")
sys.exit(not all(s["ok"] for s in steps.values()))
PYTHON

cat >"$work/breaks.py" <<'PYTHON'
"""Bad pairs. argv: work folder, result file. Each is laid over a stack's venv without its dependencies and probed."""
import datetime
import json
import os
import subprocess
import sys
from pathlib import Path

WEB = "httpx httpcore h11 anyio sniffio hf-xet typer shellingham rich markdown-it-py mdurl pygments annotated-doc click"
HUB = "huggingface-hub==0.36.2"
BREAKS = [  # rule, stack, pins laid over it, probe, words that must appear
    ("R-TV-24", "xflux-2024", "torchvision==0.20.0", "lora_steps", "operator torchvision::nms does not exist"),
    ("R-DS-RESUME", "cpu", "deepspeed==0.15.4", "zero2", "Weights only load failed"),
    ("R-DS-PYDANTIC", "xflux-2024", "deepspeed==0.15.4 pydantic==1.10.19", "import deepspeed", "field_serializer"),
    ("R-TF-HUB-4", "xflux-2024", f"huggingface-hub==1.33.0 {WEB}", "import transformers", "huggingface-hub>=0.23.2,<1.0 is required"),
    ("R-TF-HUB-5", "cpu", "transformers==5.17.0", "encoders", "No module named 'httpx'"),
    ("R-TF-HUB-518", "cpu", f"huggingface-hub==1.30.0 {WEB}", "encoders", "cannot import name 'httpx'"),
    ("R-TF-HUB-518", "cpu", HUB, "encoders", "ResolvedRevision"),
    ("R-TF-TOK-443", "xflux-2024", "tokenizers==0.22.2", "import transformers", "tokenizers>=0.19,<0.20 is required"),
    ("R-TF-TOK-517", "cpu", "tokenizers==0.22.2", "import transformers", "tokenizers>=0.23.1,<0.24.0 is required"),
    ("R-TF-SAFE", "cpu", "safetensors==0.7.0", "import transformers", "safetensors>=0.8.0 is required"),
    ("R-TF-TORCH-25", "xflux-2024", f"transformers==5.17.0 tokenizers==0.23.3 huggingface-hub==1.33.0 {WEB}", "encoders", "PyTorch >= 2.5 is required but found 2.4.0"),
    ("R-TF-TORCH-26", "xflux-2024", f"transformers==5.23.0 tokenizers==0.23.3 huggingface-hub==1.33.0 {WEB}", "encoders", "PyTorch >= 2.6 is required but found 2.4.0"),
    ("R-DIF-IDS", "xflux-2024", "diffusers==0.30.3", "lora_steps", "Sizes of tensors must match except in dimension 1"),
    ("R-DIF-TORCH-24", "xflux-2024", f"diffusers==0.35.2 {HUB} peft==0.17.1 accelerate==1.0.1 transformers==4.44.2", "lora_steps", "unexpected keyword argument 'enable_gqa'"),
    ("R-DIF-TORCH-24", "xflux-2024", f"diffusers==0.37.1 {HUB} peft==0.17.1 accelerate==1.0.1 transformers==4.44.2 {WEB}", "lora_steps", "Parameter q has unsupported type torch.Tensor"),
    ("R-DIF-HUB-33", "xflux-2024", "diffusers==0.33.1", "lora_steps", "DDUFEntry"),
    ("R-DIF-HUB-40", "cpu", f"diffusers==0.40.0 huggingface-hub==1.22.0 transformers==5.12.1 tokenizers==0.22.2 {WEB}", "lora_steps", "get_cached_repo_tree"),
    ("R-DIF-HUB-41", "cpu", f"diffusers==0.41.0 huggingface-hub==1.30.0 transformers==5.12.1 tokenizers==0.22.2 {WEB}", "lora_steps", "cannot import name 'httpx'"),
    ("R-DIF-HUB-41", "cpu", f"diffusers==0.41.0 huggingface-hub==1.25.0 transformers==5.12.1 tokenizers==0.22.2 {WEB}", "lora_steps", "resolve_revision"),
    ("R-DIF-TF-5", "cpu", "diffusers==0.35.1", "lora_steps", "FLAX_WEIGHTS_NAME"),
    ("R-DIF-TF-448", "cpu", f"diffusers==0.37.1 transformers==4.43.3 tokenizers==0.19.1 {HUB} peft==0.18.1 accelerate==1.0.1 {WEB}", "lora_steps", "Dinov2WithRegistersConfig"),
    ("R-DIF-PEFT-34", "xflux-2024", f"diffusers==0.34.0 {HUB}", "lora_steps", "peft>=0.15.0 is required"),
    ("R-DIF-PEFT-35", "xflux-2024", f"diffusers==0.35.2 {HUB}", "lora_steps", "peft>=0.17.0 is required"),
    ("R-PEFT-ACC", "xflux-2024", f"peft==0.15.2 {HUB}", "import peft", "clear_device_cache"),
    ("R-PEFT-HUB", "xflux-2024", "peft==0.14.0", "import peft", "LocalEntryNotFoundError"),
    ("R-PEFT-TF-44", "xflux-2024", f"peft==0.17.1 accelerate==1.0.1 {HUB}", "import peft", "HybridCache"),
    ("R-PEFT-TF-5", "cpu", "peft==0.17.1", "import peft", "HybridCache"),
    ("R-PEFT-TORCHAO", "cpu", "torchao==0.15.0", "lora_steps", "Found an incompatible version of torchao"),
    ("R-NVML-SHADOW", "cpu", "pynvml==11.5.3 nvidia-ml-py==13.615.71", "import pynvml; pynvml.nvmlDeviceGetGpuFabricInfoV", "has no attribute 'nvmlDeviceGetGpuFabricInfoV'"),
]

def probe(python: Path, code: str, overlay: str) -> str:
    code = code if code.startswith("import") else f"import toys; toys.{code}()"
    paths = os.pathsep.join(filter(None, [overlay, str(work)]))
    env = {**os.environ, "PYTHONPATH": paths, "TORCH_EXTENSIONS_DIR": f"{overlay or work / 'none'}.ops"}
    done = subprocess.run([python, "-c", code], env=env, capture_output=True, text=True, timeout=1200, cwd="/")
    return done.stdout + done.stderr if done.returncode else ""

work, rows, bad, controls = Path(sys.argv[1]), [], 0, {}
for number, (rule, stack, pins, code, words) in enumerate(BREAKS):
    python, overlay = work / stack / "bin/python", work / f"laid-{number}"
    if "nvml" not in code and (stack, code) not in controls:  # the stack itself must pass what breaks under the overlay
        controls[stack, code] = probe(python, code, "")
        bad += bool(controls[stack, code])
        print(f"{'FAIL' if controls[stack, code] else 'ok  '} {stack} alone passes: {code}", flush=True)
    argv = [python, "-m", "pip", "install", "--quiet", "--no-deps", "--upgrade", "--target", overlay, *pins.split()]
    installed = subprocess.run(argv, capture_output=True, text=True)
    said = probe(python, code, str(overlay)) if installed.returncode == 0 else installed.stderr
    line = next((line.strip() for line in said.splitlines() if words in line), "")
    bad += not line
    rows.append({"rule": rule, "stack": stack, "laid over": pins, "probe": code, "expected": words, "seen": line[:300]})
    print(f"{'ok  ' if line else 'FAIL'} {rule:<16} {line[:150] or said[-600:] or 'nothing broke'}", flush=True)
json.dump({"date": datetime.date.today().isoformat(), "rows": rows}, open(sys.argv[2], "w"), indent=1)
print(f"{len(rows)} bad pairs, {bad} did not do what was expected")
sys.exit(bad > 0)
PYTHON

install() { # a stack into $work/NAME, from its own requirements file
    local venv=$work/$1 begin=$SECONDS
    "$doctor" matrix export "$1" >"$work/$1.txt" || return 1
    [ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -r "$work/$1.txt" || return 1
    echo "== $1: installed in $((SECONDS - begin)) s, $(du -sh "$venv" | cut -f1)"
    "$venv/bin/python" -m pip check
}

failed=0
if [ "${1:-}" = breaks ]; then
    for name in xflux-2024 cpu; do install "$name"; done
    "$python" "$work/breaks.py" "$work" "$results/breaks.json" || failed=1
    exit "$failed"
fi
[ $# -gt 0 ] || set -- xflux-2024 cuda12 cuda13 cpu
minor=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
for name in "$@"; do
    build=$("$doctor" matrix show "$name" | awk '/^  torch:/ {torch = 1} torch && /build:/ {print $2; exit}')
    if install "$name"; then
        TORCH_EXTENSIONS_DIR=$work/$name.ops "$work/$name/bin/python" "$work/stack.py" "$name" "$build" "$work/$name.txt" \
            "$results/stack-$name-py$minor.json" 2>"$work/$name.log" || { failed=1; tail -n 20 "$work/$name.log"; }
    else
        echo "FAIL $name could not be installed with Python $minor" && failed=1
    fi
    [ -n "${WORK:-}" ] || rm -rf "${work:?}/$name" "$work/$name.ops"
done
exit "$failed"
