"""Excerpts of jobs that stop before their first step: launch files, folders, variables, and the bundled trainer's own
sentences. All are taken from logs of tests/pairs, shortened."""

from __future__ import annotations

# ruff: noqa: E501 - lines as the programs print them
from excerpts_kit import crash

_SITE = "/usr/lib/python3/dist-packages"
_PLUGIN = f'{_SITE}/accelerate/utils/dataclasses.py:1200:__post_init__: self.zero_stage = int(os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", 2))'
_READS = f"{_SITE}/accelerate/utils/deepspeed.py:149:__init__: config = self.config.get('zero_optimization')"
_FILE = f"{_SITE}/accelerate/utils/deepspeed.py:130:__init__: config_decoded = base64.urlsafe_b64decode(config_file_or_dict)"


def said(*sentences: str) -> list[str]:
    """What the bundled trainer says."""
    return [f"error: {sentence}\n" for sentence in sentences]


def looked_for(error: str, *frames: str) -> str:
    """A package that transformers finds and imports ends in an error, and transformers in one of its own."""
    inside = crash(
        error,
        "/venv/lib/python3.11/site-packages/transformers/integrations/hub_kernels.py:83:<module>: if is_kernels_available():",
        "/venv/lib/python3.11/site-packages/transformers/utils/import_utils.py:97:_is_package_available: package = importlib.import_module(pkg_name)",
        "/usr/lib/python3.11/importlib/__init__.py:126:import_module: return _bootstrap._gcd_import(name[level:], package, level)",
        *frames,
    )
    said = "Could not import module 'CLIPTextModel'. Are this object's requirements defined correctly?"
    outside = crash(
        f"ModuleNotFoundError: {said}", "/home/me/my job/train.py:3:<module>: from transformers import CLIPTextModel"
    )
    return f"{inside}\nThe above exception was the direct cause of the following exception:\n\n{outside}"


MORE: dict[str, list[str]] = {
    "torchvision-mismatch": [
        looked_for("RuntimeError: operator torchvision::nms does not exist", "/venv/lib/python3.11/site-packages/torchvision/__init__.py:10:<module>: from torchvision import _meta_registrations"),
    ],
    "version-skew-import": [
        looked_for("ImportError: cannot import name 'x' from 'huggingface_hub' (/venv/lib/python3.11/site-packages/huggingface_hub/__init__.py)", "/venv/lib/python3.11/site-packages/kernels/__init__.py:1:<module>: from kernels.layer import Device"),
        crash("ImportError: cannot import name 'LocalEntryNotFoundError' from 'huggingface_hub.errors' (/x/huggingface_hub/errors.py)"),
        crash("ImportError: Found an incompatible version of torchao. Found version 0.15.0, but only versions above 0.16.0 are supported"),
        crash("TypeError: scaled_dot_product_attention() got an unexpected keyword argument 'enable_gqa'"),
        crash("ValueError: infer_schema(func): Parameter q has unsupported type torch.Tensor. The valid types are: dict_keys([])"),
    ],
    "missing-shared-library": [crash("ImportError: libcudnn.so.9: cannot open shared object file: No such file or directory")],
    "config-missing-key": [
        *said("train.yaml: learning_rte: is not a key of the train config. Did you mean learning_rate?",
              "train config: lora_targets: matches no layer. Name endings such as attn.to_q."),
        crash("yaml.scanner.ScannerError: while scanning for the next token", f"{_SITE}/accelerate/commands/config/config_args.py:40:load_config_from_file: return config_class.from_yaml_file(yaml_file=config_file)"),
        crash("ValueError: 'float16' is not a valid PrecisionType"),
        crash("ValueError: 'INDUCTR' is not a valid DynamoBackend"),
        crash("ValueError: Unknown dynamo backend: INDUCTR. Choose between ['NO', 'EAGER']."),
        crash("KeyError: 'FULL'", f"{_SITE}/accelerate/utils/dataclasses.py:1720:__post_init__: self.sharding_strategy = ShardingStrategy[self.sharding_strategy.upper()]"),
        crash("ValueError: 'FULL' is not in list", f"{_SITE}/accelerate/utils/dataclasses.py:1121:__post_init__: FSDP_SHARDING_STRATEGY.index(sharding_strategy) + 1"),
        crash("ValueError: Less than two GPU ids were configured and tried to run on on multiple GPUs."),
        crash("RuntimeError: Mesh should not be bigger than default world size 2, but found 4 ranks!", f"{_SITE}/accelerate/parallelism_config.py:201:build_device_mesh: init_device_mesh("),
    ],
    "deepspeed-config-mismatch": [
        *said("The DeepSpeed file ds.json cannot be read: Expecting value. Correct or remove it.",
              "The DeepSpeed file's zero_optimization is 2. Write keys and values there.",
              "The DeepSpeed file's offload_param is 'disk'. Write {\"device\": \"cpu\"} there.",
              "The accelerate config's gradient_clipping is 'much'. Set it to a number; 0 clips nothing."),
        crash("pydantic_core._pydantic_core.ValidationError: 1 validation error for DeepSpeedZeroConfig\noverlap_com\n  Extra inputs are not permitted [type=extra_forbidden, input_value=True, input_type=bool]"),
        crash("AssertionError: Cannot provide deprecated parameter 'cpu_offload' and replacing parameter 'offload_optimizer' together"),
        crash("ValueError: Please specify the ZeRO optimization config in the DeepSpeed config."),
        crash("AttributeError: 'int' object has no attribute 'get'", _READS),
        crash("ValueError: invalid literal for int() with base 10: 'two'", _PLUGIN),
        crash("ValueError: could not convert string to float: 'much'", _PLUGIN),
        crash("ValueError: invalid truth value maybe", _PLUGIN),
        crash("json.decoder.JSONDecodeError: Expecting property name enclosed in double quotes: line 1", f"{_SITE}/accelerate/utils/deepspeed.py:120:__init__: config = json.load(f)"),
    ],
    "checkpoint-mismatch": said(
        "resume from out/checkpoint-2: rank: is 8, and the checkpoint has 4.",
        "a.safetensors holds 3 pairs of other widths. Was it trained on another model?",
        "out/checkpoint-2 is not a checkpoint of this trainer. Name another.",
    ),
    "dataset-file-missing": said(
        "photos/a.jpg has no caption file a.json. Write a.json beside the image.",
        "/data/nowhere does not exist. Set img_dir to the folder of training images.",
        "/data/empty holds no images. Name the folder that does.",
    ),
    "dataset-key-missing": said(
        'photos/a.json has no "caption". Write {"caption": "what the image shows"}.',
        "train.parquet has no column text. Set caption_column to the one that is meant.",
    ),
    "image-decode": said(
        "photos/a.jpg is cut short: its 59,270 bytes end in the middle of the image. Copy the image again, or remove it.",
        "photos/a.jpg is not an image but an HTML page. Save it as JPEG, PNG or WebP, or remove it.",
        "photos/a.gif cannot be decoded: broken. Save it again, or remove it.",
        "photos/a.jpg is empty (0 bytes). Copy the image again, or remove it.",
    ),
    "corrupt-checkpoint": said(
        "flux/transformer/a.safetensors is broken or cut short: incomplete metadata. Download it again.",
        "flux/a.safetensors is not a safetensors file. Download it again.",
        "flux cannot be read as a FLUX.1 model: flux/a.safetensors is cut short. Download it again.",
        "out/checkpoint-2/a.safetensors is not as it was written. Remove that folder.",
    ),
    "hub-gated": [
        crash("huggingface_hub.errors.GatedRepoError: 401 Client Error. (Request ID: x)"),
        crash("huggingface_hub.errors.RepositoryNotFoundError: 404 Client Error. (Request ID: x)"),
        *said(
        "black-forest-labs/FLUX.1-dev is gated: this account has not been let in. Accept its licence.",
        "The hub has no model me/flux, or it is private. Log in."),
    ],
    "hub-offline": [
        crash("huggingface_hub.errors.LocalEntryNotFoundError: An error happened while trying to locate the file."),
        *said(
        "black-forest-labs/FLUX.1-dev is not on this machine and the hub cannot be reached. Connect to the network.",
        "black-forest-labs/FLUX.1-dev is not on this machine and the hub may not be asked (HF_HUB_OFFLINE is set). Unset it."),
    ],
    "module-missing": [
        looked_for("ModuleNotFoundError: No module named '_lzma'", "/venv/lib/python3.11/site-packages/soundfile.py:12:<module>: import lzma", "/usr/lib/python3.11/lzma.py:27:<module>: from _lzma import *"),
        *said("quantization nf4 needs bitsandbytes, which is not installed. Install it with `pip install bitsandbytes`, or set another quantization.",
              "optimizer is adamw8bit, but torchao cannot be imported: No module. Run `pip install 'torchao'`, or set optimizer to adamw or adafactor.",
              "train.parquet is a table. Run `pip install pyarrow`.",
              "control_type is canny. Run `pip install opencv-python-headless`, or set control_type to files."),
        crash("ModuleNotFoundError: No module named 'torch_xla'"),
        crash("ModuleNotFoundError: No module named 'diffusers'"),
        crash("RuntimeError: FP8 is not available on this machine. Please ensure that either Transformer Engine, MSAMP or torchao is installed."),
        crash("ValueError: Using `fp8` precision requires `transformer_engine` or `MS-AMP` to be installed."),
    ],
    "invalid-device-ordinal": said("Process 1 of 8 finds only 1 GPU(s) here. Set num_processes to 1 in the accelerate config."),
    "no-nvidia-driver": said("torch finds no GPU here, and 11,901,408,320 parameters are too many for the CPU. Run `xflux-doctor check` to see why."),
    "disk-full": said(
        "Cannot write out/checkpoint-2: no space left on device. Free some space, or set output_dir to another disk.",
        "Cannot write the cache encoded: no space left on device. Free some space, or set output_dir to another disk.",
    ),
    "dataloader-shm-bus-error": [
        crash("RuntimeError: unable to allocate shared memory(shm) for file </torch_8657_56260771_0>: No space left on device (28)"),
    ],
    "model-file-missing": [
        *said("The folder /models/flux does not exist. Correct pretrained_model in the train config.",
              "/models/flux is not a FLUX.1 pipeline in diffusers' layout: it has no vae. Point pretrained_model elsewhere.",
              "flux/vae cannot be loaded: Error no file named diffusion_pytorch_model.safetensors found in directory flux/vae. Download the model again.",
              "flux/tokenizer_2 is empty. Download the model again.",
              "The environment variable FLUX_DEV names /x, which is not a file. Correct FLUX_DEV, or unset it to take the hub's file."),
        crash("OSError: Error no file named diffusion_pytorch_model.bin found in directory flux/vae."),
        crash("OSError: /models/flux does not appear to have a file named config.json."),
        crash("FileNotFoundError: [Errno 2] No such file or directory: '/models/flux/flux1-dev.safetensors'"),
    ],
    "output-not-shared": [
        "error: Rank 1 on node2 does not see what rank 0 wrote to /data/out. Put output_dir and cache_dir on a disk "
        "that all machines share, such as NFS or Lustre.\n",
    ],
    "output-not-writable": [
        *said("Cannot write out: permission denied. Allow writing there, or set output_dir to another folder.",
              "Cannot write out: read-only file system. Set output_dir to a folder that can be written to.",
              "Cannot write the cache taken/cache: not a directory. A file stands where a folder is wanted: name another folder."),
        crash("PermissionError: [Errno 13] Permission denied: '/out'", "/workspace/train.py:9:main: os.makedirs(args.output_dir, exist_ok=True)"),
        crash("OSError: [Errno 30] Read-only file system: '/hf/hub'", f"{_SITE}/huggingface_hub/file_download.py:9:x: os.makedirs(storage_folder)"),
    ],
    "variable-refused": [
        crash("ValueError: The value of TORCH_DISTRIBUTED_DEBUG must be OFF, INFO, or DETAIL."),
        crash("ValueError: invalid literal for int() with base 10: 'all'", f'{_SITE}/accelerate/utils/environment.py:9:x: if int(os.environ.get("OMP_NUM_THREADS", 0)) == 0:'),
        crash("httpx.UnsupportedProtocol: Request URL is missing an 'http://' or 'https://' protocol."),
        crash("requests.exceptions.MissingSchema: Invalid URL 'hub.example.org/api/models/x': No scheme supplied. Perhaps you meant https://hub.example.org/api/models/x?"),
        "Fatal Python error: init_fs_encoding: failed to get the Python codec of the filesystem encoding\nModuleNotFoundError: No module named 'encodings'\n",
    ],
    "module-shadowed": [
        crash("ImportError: cannot import name 'Tensor' from 'torch' (/home/me/job/torch.py)"),
        crash("AttributeError: module 'torch' has no attribute 'nn' (consider renaming '/home/me/job/torch.py' since it has the same name as the library you intended to import)"),
        crash("ModuleNotFoundError: No module named 'torch.nn'; 'torch' is not a package"),
        looked_for("ModuleNotFoundError: No module named 'helpers'", "/home/me/my job/kernels.py:1:<module>: from helpers import fast"),
    ],
    "setting-refused": said(
        "The accelerate config asks for MEGATRON_LM, which this trainer does not do. Set distributed_type to NO.",
        "The accelerate config asks for ZeRO stage two, which this trainer does not do. Set zero_stage to 2.",
        "step_in_backward cannot accumulate gradients, and gradient_accumulation_steps is 4. Set it to 1.",
        "weight_update is kahan, but DeepSpeed holds fp32 masters of what is trained. Set weight_update to auto.",
        "quantization is int8, and zero3 cannot cut a quantised base into parts. Launch without it, or set quantization: none.",
        "optimizer is adamw8bit, which is not done under DeepSpeed. Set optimizer to adamw.",
        "kernels is fused, but the model is cut up. Set kernels to auto, which takes diffusers' code here.",
        "checkpointed_blocks is 20, which fused kernels alone do, and kernels is diffusers. Set checkpointed_blocks to null.",
        "attention is flash-attn-4, which does not work here: it is for CUDA. Set attention to auto, which takes the fastest that works.",
    ),
}  # fmt: skip
