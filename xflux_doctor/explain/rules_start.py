"""Causes: what stops a job before its first step: files and folders of the model and the run, variables, settings; and
the sentences by which the bundled trainer says what others say in a traceback."""

from __future__ import annotations

from xflux_doctor.explain.rule import Rule, Sign

_WEIGHTS = r"(?:pytorch_model|model|diffusion_pytorch_model|flux\w*|ae)[\w.-]*\.(?:safetensors|sft|bin)"
_NOT_WRITTEN = r"(?:PermissionError|OSError|NotADirectoryError|FileExistsError): \[Errno (?:1|13|17|20|30)\]"
_FOLDERS = "(torch|accelerate|diffusers|transformers|datasets|deepspeed|peft|numpy|safetensors|PIL|yaml|tokenizers)"
"""Packages that are folders: a single file of that name is another's."""
_OPTIONAL = (
    r'import_utils\.py", line \d+, in _is_package_available\n(?:(?!\s*File ").*\n)*'
    r'(?:\s*File "[^"]*(?:importlib/__init__\.py|importlib\._bootstrap\w*>)".*\n(?:(?!\s*File ").*\n)*)*'
    r'\s*File "(?![^"]*(?:-packages/|/lib(?:64)?/python3))[^"]+\.py", line \d+, in <module>'
)
"""A library looks whether a package is there and imports it, and the first file that runs is in no package's place."""
_SAVES = r"save|makedirs|mkdir|open\(|Writer|checkpoint|log"

RULES: tuple[Rule, ...] = (
    Rule(
        "model-file-missing",
        "a file or folder of the base model is not there",
        (
            Sign("The folder ", r"^error: The folder \S+ does not exist\. Correct pretrained_model"),
            Sign("is not a FLUX.", r"^error: .* is not a FLUX\.1 pipeline in diffusers' layout"),
            Sign("cannot be loaded: Error no file named", r"^error: "),
            Sign(
                "Download the model again.",
                r"^error: .*(?:is missing|is empty|lacks|holds neither|cannot be loaded)",
                weight=48,
            ),
            Sign("which is not a file. Correct ", r"^error: The environment variable"),
            Sign("no file named ", rf"OSError: Error no file named {_WEIGHTS}"),
            Sign("does not appear to have a file named", r"OSError: "),
            Sign("No such file or directory", rf"FileNotFoundError: .*{_WEIGHTS}'"),
        ),
        "The path names another folder, or the download did not bring every part.",
        "Correct pretrained_model, or download the model again.",
        ("ls -lR FOLDER", "xflux-doctor check"),
        weight=52,
    ),
    Rule(
        "output-not-writable",
        "a folder that the job writes to cannot be written",
        (
            Sign("Cannot write ", r"^error: Cannot write .*: (?:permission denied|operation not permitted)"),
            Sign("Cannot write ", r"^error: Cannot write .*: (?:read-only file system|not a directory|file exists)"),
            Sign("Cannot write the cache ", r"^error: .*(?:permi|read-only|not a dir|exists)", weight=56, code="ST106"),
            Sign("Errno", _NOT_WRITTEN, within=_SAVES),
            Sign(
                "Errno", _NOT_WRITTEN, within=r"huggingface_hub/|hub/cache|/\.triton|/\.cache", weight=56, code="ST106"
            ),
        ),
        "The folder is mounted read-only, belongs to another user, or a file stands in its place.",
        "Set output_dir (or the cache's folder) to a place where this user may write.",
        ("ls -ld FOLDER", "touch FOLDER/x", "mount | grep ' ro'"),
        weight=54,
    ),
    Rule(
        "output-not-shared",
        "the machines of the run write to different disks",
        (Sign(" does not see what rank ", r"^(?:error: )?Rank \d+ on \S+ does not see what rank 0 wrote to "),),
        "Rank 0 writes the list of images and the checkpoints, and the ranks of every machine read them.",
        "Put output_dir and cache_dir on a disk that all machines share, such as NFS or Lustre.",
        ("df OUTPUT_DIR", "mount | grep -E 'nfs|lustre|gpfs|ceph'"),
        weight=58,
    ),
    Rule(
        "variable-refused",
        "an environment variable has a value that a library refuses",
        (
            Sign("TORCH_DISTRIBUTED_DEBUG", r"Error: .*(?:TORCH_DISTRIBUTED_DEBUG must be|TORCH_DISTRIBUTED_DEBUG)"),
            Sign("invalid literal for int()", within="OMP_NUM_THREADS", weight=58, code="EN401"),
            Sign("Request URL is missing an 'http", code="EN406"),
            Sign(
                "No scheme supplied", r"Invalid URL '[^']*api/models|Invalid URL '[^']*resolve", weight=68, code="EN406"
            ),
            Sign("No module named 'encodings'", code="EN407"),
        ),
        "It was set for another program or is misspelt: the library reads it at its start and stops.",
        "Correct the variable that the message names, or unset it.",
        ("env | sort", "xflux-doctor check"),
        weight=57,
    ),
    Rule(
        "module-shadowed",
        "a file of the job's own folder is imported in a package's place",
        (
            Sign("cannot import name", rf"from (?:partially initialized module )?'{_FOLDERS}' \(\S+/\1\.py\)"),
            Sign("consider renaming", rf"(?:AttributeError|ImportError): .*consider renaming '\S+/{_FOLDERS}\.py'"),
            Sign("Error: ", r"^\w*Error: ", within=_OPTIONAL),
            Sign("is not a package", rf"No module named '{_FOLDERS}\.[\w.]+'; '\w+' is not a package"),
        ),
        "Python looks into the script's or the working folder first: a torch.py there wins over the real torch.",
        "Rename the file or folder that the message shows, and remove its __pycache__.",
        ("python -c 'import torch; print(torch.__file__)'",),
        weight=63,
    ),
    Rule(
        "setting-refused",
        "the trainer does not do what the settings ask for",
        (
            Sign("which this trainer does not do.", r"^error: "),
            Sign("asks for ZeRO stage ", r"^error: .*ZeRO stage [^\d]", weight=56, code="LA304"),
            Sign(
                "under DeepSpeed",
                r"^error: (?:optimizer|quantization|weight_update|stream_blocks|modulation)",
                code="LA116",
            ),
            Sign("step_in_backward", r"^error: step_in_backward (?:steps|cannot)", code="LA116"),
            Sign("holds fp", r"^error: weight_update is \w+, but \w+ holds fp32 masters", code="LA116"),
            Sign("cannot cut a quantised base", r"^error: ", code="LA116"),
            Sign("kernels is fused, but", r"^error: ", code="SW117"),
            Sign("checkpointed_blocks is", r"^error: .*fused kernels alone do", code="SW117"),
            Sign("Set attention to", r"^error: attention is", code="SW117"),
        ),
        "Two settings exclude each other, or the launch file asks for a strategy that this trainer has not.",
        "Change the setting as the sentence says.",
        ("xflux-doctor check",),
        weight=55,
    ),
)

SIGNS: dict[str, tuple[Sign, ...]] = {
    "config-missing-key": (Sign("error: ", r"^error: (?!resume from )(?:\S+\.(?:ya?ml|json)|train config): "),),
    "checkpoint-mismatch": (
        Sign("error: ", r"^error: resume from "),
        Sign("Was it trained on another model?", r"^error: "),
        Sign("is not a checkpoint of this trainer", r"^error: "),
    ),
    "deepspeed-config-mismatch": (
        Sign(
            "The DeepSpeed file", r"^error: The DeepSpeed file .*(?:cannot be read|is not a JSON object)", code="LA301"
        ),
        Sign("The DeepSpeed file's zero_optimization is", r"^error: ", code="LA307"),
        Sign("The DeepSpeed file's", r"^error: .*(?:offload|gradient_clipping)", code="LA310"),
        Sign("The accelerate config's gradient_clipping is", r"^error: ", code="LA304"),
    ),
    "dataset-file-missing": (
        Sign("has no caption file", r"^error: "),
        Sign("Set img_dir to the folder of", r"^error: .*(?:does not exist|is a file)"),
        Sign("holds no images", r"^error: "),
    ),
    "dataset-key-missing": (
        Sign('has no "caption"', r"^error: "),
        Sign("error: ", r"^error: .*(?:caption_column|image_column)"),
    ),
    "image-decode": (
        Sign("end in the middle of the image", r"^error: "),
        Sign("is not an image but", r"^error: "),
        Sign("cannot be decoded: ", r"^error: "),
        Sign("is empty", r"^error: .* is empty \(0 bytes\)\. Copy the image again"),
    ),
    "corrupt-checkpoint": (
        Sign("is broken or cut short", r"^error: "),
        Sign("is not a safetensors file", r"^error: "),
        Sign("cannot be read as a FLUX.", r"^error: .*(?:not a safetensors file|cut short|broken safetensors header)"),
        Sign("is not as it was written", r"^error: "),
    ),
    "hub-gated": (
        Sign("is gated: this account has not been let in", r"^error: "),
        Sign("or it is private.", r"^error: The hub has no model"),
    ),
    "hub-offline": (
        Sign("is not on this machine and the hub ", r"^error: .*cannot be reached"),
        Sign("is not on this machine and the hub ", r"^error: .*may not be asked", code="WE102"),
    ),
    "module-missing": (
        Sign("error: quantization", r"^error: quantization \S+ needs [\w-]+, which", code="SW116"),
        Sign("error: optimizer is", r"^error: optimizer is \w+, but \w+ cannot be imported", code="SW116"),
        Sign("Run `pip install pyarrow`", r"^error: ", code="DA107"),
        Sign("Run `pip install opencv-python-headless`", r"^error: ", code="DA107"),
    ),
    "invalid-device-ordinal": (Sign("GPU(s) here.", r"^error: Process \d+ of \d+ finds only"),),
    "no-nvidia-driver": (Sign("torch finds no GPU here", r"^error: "),),
    "disk-full": (
        Sign("Cannot write ", r"^error: Cannot write .*: (?:no space|disk quota exceeded)", weight=51, code="DA102"),
        Sign("Cannot write the cache ", r"^error: .*(?:no space|disk quota exceeded)", weight=52, code="ST102"),
    ),
}
"""What the bundled trainer says (trainer/errors.py: `error: `, what was seen, what to do next), by the cause."""
