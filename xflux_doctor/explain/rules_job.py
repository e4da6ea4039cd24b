"""Causes: the job itself: its data, checkpoints, model and numbers."""

from __future__ import annotations

from xflux_doctor.explain.rule import Rule, Sign

_DATA = (
    r"dataset|in collate|_worker_loop|in __getitem__|in _get_files|listdir|scandir|glob\("
    r"|i(?:mg|mage)_(?:dir|path|folder)"
)
_PICTURE = r"(?:json|txt|caption|jpe?g|png|webp|bmp|gif|tiff?|avif|parquet|arrow|jsonl|csv|tar)"
_MODEL_JSON = r"(?![^']*(?:config|index|tokenizer\w*|vocab|special_tokens_map|ds_\w+)\.json')"
_COLUMNS = (
    r"captions?|text|txt|prompts?|images?|img|pixel_values|file_name|path|jpg|json|label|mask|conditioning_\w+|hint"
)
_NO_NET = r"(?:httpx|httpcore|requests\.exceptions)\.\w*(?:Connect|Timeout|Proxy)"

RULES: tuple[Rule, ...] = (
    Rule(
        "ddp-unused-parameters",
        "a trained parameter got no gradient",
        (
            Sign("Expected to have finished reduction in the prior iteration"),
            Sign("that were not used in producing loss"),
        ),
        "DistributedDataParallel waits for the gradient of every trained parameter, and a branch was not used.",
        "Freeze or remove the unused module, or pass DistributedDataParallelKwargs(find_unused_parameters=True).",
        ("TORCH_DISTRIBUTED_DEBUG=DETAIL",),
        "https://pytorch.org/docs/stable/generated/torch.nn.parallel.DistributedDataParallel.html",
        weight=60,
    ),
    Rule(
        "no-trainable-parameters",
        "nothing is left to train",
        (
            Sign("optimizer got an empty parameter list"),
            Sign("does not require grad and does not have a grad_fn"),
            Sign("any parameters that require a gradient", r"DistributedDataParallel is not needed"),
            Sign("not found in the base model", r"Target modules .* not found"),
            Sign("No modules were targeted for adaptation"),
        ),
        "The LoRA targets match no layer of the model, or every parameter was frozen.",
        "Compare the target names with the model's own, and set requires_grad on the LoRA layers before prepare().",
        (),
        weight=60,
    ),
    Rule(
        "fp16-grad-scaler",
        "the trained parameters are in fp16, or have no gradients, at the gradient scaler",
        (
            Sign("Attempting to unscale FP", r"Attempting to unscale FP16 gradients"),
            Sign("No inf checks were recorded for this optimizer"),
        ),
        "With fp16 the scaler needs trained parameters in fp32, and gradients on them when the optimizer steps.",
        "Keep the trained (LoRA) parameters in fp32, or use bf16, which needs no scaler.",
        (),
        "https://pytorch.org/docs/stable/notes/amp_examples.html",
        weight=60,
    ),
    Rule(
        "dtype-mismatch",
        "weights and inputs have different dtypes",
        (
            Sign("must have the same dtype", r"Error: .*must have the same dtype"),
            Sign("to have the same dtype, but got"),
            Sign("expected scalar type", r"expected scalar type \w+ but found"),
            Sign("should be the same", r"Input type \(.*\) and (?:bias|weight) type \("),
            Sign("Expected query, key, and value to have the same dtype"),
            Sign("requires the source and destination dtypes match"),
            Sign("not implemented for", r"\"\w+\" not implemented for '(?:Half|BFloat16|Float8_\w+)'"),
        ),
        "Part of the model or of the batch was cast and part was not.",
        "Cast inputs and frozen modules to the same weight dtype, or run the forward pass under autocast.",
        (),
        weight=55,
    ),
    Rule(
        "shape-mismatch",
        "tensors of shapes that do not go together",
        (
            Sign("shapes cannot be multiplied"),
            Sign("The size of tensor a", r"must match the size of tensor b"),
            Sign("Sizes of tensors must match except in dimension"),
            Sign("expected input", r"expected input\[.*\] to have \d+ channels"),
            Sign("stack expects each tensor to be equal size"),
            Sign("is invalid for input of size", r"Error: shape '\["),
            Sign("EinopsError"),
            Sign("Given groups=", r"expected weight|to have \d+ channels"),
        ),
        "A VAE, text encoder or adapter of another model, or images of different sizes in one batch.",
        "Use the VAE (16 channels) and text encoders that belong to FLUX.1, and one image size in a batch.",
        (),
        weight=50,
    ),
    Rule(
        "checkpoint-mismatch",
        "the checkpoint belongs to another model or setup",
        (
            Sign("in loading state_dict for", r"Error\(s\) in loading state_dict"),
            Sign("size mismatch for "),
            Sign("loaded state dict", r"loaded state dict (?:contains a parameter group|has a different number)"),
            Sign("The checkpoint being loaded used a DP world size"),
            Sign("key(s) in state_dict", r"(?:Missing|Unexpected) key\(s\)"),
        ),
        "Names or shapes in the file differ from the model in memory: another LoRA rank, another size or script.",
        "Resume with the config that the checkpoint was saved with, or start anew in another output folder.",
        (),
        weight=55,
    ),
    Rule(
        "checkpoint-weights-only",
        "torch refuses to load the checkpoint because it holds more than tensors",
        (
            Sign("Weights only load failed"),
            Sign("WeightsUnpickler error"),
        ),
        "Since 2.6 torch.load takes tensors only; DeepSpeed before 0.16 saved and loaded more than that.",
        "Upgrade DeepSpeed to 0.16 or newer, or stay on torch below 2.6 for this run.",
        ('pip install -U "deepspeed>=0.16"',),
        "https://pytorch.org/docs/stable/generated/torch.load.html",
        weight=58,
    ),
    Rule(
        "corrupt-checkpoint",
        "a weights file is cut off or is not a weights file",
        (
            Sign("SafetensorError", r"SafetensorError: Error while deserializing"),
            Sign("HeaderTooLarge"),
            Sign("MetadataIncompleteBuffer"),
            Sign("InvalidHeader"),
            Sign("invalid load key, "),
            Sign("pickle data was truncated"),
            Sign("EOFError: Ran out of input"),
            Sign("PytorchStreamReader failed"),
            Sign("unexpected EOF, expected"),
            Sign("without having git-lfs installed"),
            Sign("Unable to load weights from", r"(?:OSError|checkpoint file)", weight=45),
            Sign("Consistency check failed: file should be of size"),
            Sign(
                "The cache entry ", r"The cache entry .* (?:cannot be read|was damaged on the disk)"
            ),  # this trainer's
        ),
        "A download or a save was interrupted, or git left a small pointer file in the place of the weights.",
        "Look at the size of the file, delete it and download it again (`git lfs pull` for a clone).",
        ("ls -l FILE", "head -c 200 FILE", "hf download REPO FILE"),
        weight=57,
    ),
    Rule(
        "dataset-file-missing",
        "a file or folder of the dataset is not there",
        (
            Sign("No such file or directory", rf"FileNotFoundError: .*: {_MODEL_JSON}'[^']*\.{_PICTURE}'"),
            Sign("No such file or directory", rf"FileNotFoundError: .*: {_MODEL_JSON}'", within=_DATA, weight=45),
            Sign("NotADirectoryError", within=_DATA),
            Sign("num_samples should be a positive integer value, but got num_samples"),
            Sign("Couldn't find any data file at"),
            Sign("EmptyDatasetError"),
            Sign("doesn't contain any data files"),
        ),
        "The config points to a place without images, or an image has no caption file beside it.",
        "Correct data_config.img_dir, and see that each image has its caption file of the same name.",
        ("ls -l PATH", "xflux-doctor check"),
        weight=50,
    ),
    Rule(
        "dataset-key-missing",
        "a caption file or a dataset row lacks a key",
        (
            Sign("KeyError: ", rf"KeyError: ['\"](?:{_COLUMNS})['\"]"),
            Sign("KeyError: ", r"KeyError: (?!['\"][A-Z_]+['\"])", within=_DATA, weight=45),
            Sign("_column` value", r"`--\w+_column` value"),
            Sign("needs to be one of: ", r"_column"),
            Sign("JSONDecodeError", within=_DATA, weight=44),
        ),
        "The trainer reads the caption under one name and the file has another, or is not complete.",
        "Use the key that the trainer expects in every caption file, or name the columns in the config.",
        ("xflux-doctor check",),
        weight=50,
    ),
    Rule(
        "image-decode",
        "an image of the dataset cannot be read",
        (
            Sign("image file is truncated"),
            Sign("cannot identify image file"),
            Sign("DecompressionBombError"),
            Sign("UnidentifiedImageError", r"UnidentifiedImageError: (?!Caught)"),
            Sign("broken data stream when reading image file"),
            Sign("Truncated File Read"),
            Sign("broken PNG file"),
            Sign("not a PNG file"),
            Sign("unrecognized data stream contents when reading image file"),
            Sign("Decompressed data too large for PngImagePlugin"),
        ),
        "The file is cut off, is something else with an image's name, or is larger than Pillow allows.",
        "Remove or fetch again the file that is named; resize what is too large.",
        ("file PATH", "xflux-doctor check"),
        weight=60,
    ),
    Rule(
        "nan-loss",
        "the loss is no longer a number",
        (
            Sign("oss is nan", r"(?i)\bloss is nan"),
            Sign("NaN", r"(?i)(?:error|exception)\b.*\bloss\b.*\bnan\b|loss became nan"),
            Sign("returned nan values in its"),
            Sign("Current loss scale already at minimum"),
        ),
        "Numbers overflowed or a gradient exploded; every later step only spreads it.",
        "Lower the learning rate, clip gradients, use bf16 instead of fp16, and look for broken images or latents; "
        "resume from a checkpoint before it.",
        ("grep -n -i -m1 nan LOGFILE",),
        weight=50,
    ),
    Rule(
        "hub-gated",
        "the Hugging Face repository is gated or private",
        (
            Sign("GatedRepoError", r"GatedRepoError: |^[\w.]*GatedRepoError"),
            Sign("Cannot access gated repo"),
            Sign("trying to access a gated repo"),
            Sign("Access to model", r"is restricted"),
            Sign("Client Error", r"(?:401|403) Client Error.*(?:huggingface\.co|hf\.co)"),
            Sign("RepositoryNotFoundError", r"RepositoryNotFoundError: |^[\w.]*RepositoryNotFoundError", weight=45),
            Sign("is not a valid model identifier listed on", weight=45),
            Sign("Invalid user token"),
            Sign("Invalid username or password"),
        ),
        "FLUX.1-dev's weights are given to accounts that accepted its licence; this job is not logged in as one.",
        "Accept the licence on the model's page, then log in on this machine or set HF_TOKEN.",
        ("hf auth login", "hf auth whoami"),
        "https://huggingface.co/docs/hub/models-gated",
        weight=66,
    ),
    Rule(
        "hub-offline",
        "the Hugging Face Hub cannot be reached and the file is not in the cache",
        (
            Sign("LocalEntryNotFoundError", r"LocalEntryNotFoundError: |^[\w.]*LocalEntryNotFoundError"),
            Sign("OfflineModeIsEnabled", code="WE102"),
            Sign("offline mode is enabled", r"Error", code="WE102"),
            Sign("We couldn't connect to '"),
            Sign("Couldn't connect to the Hub"),
            Sign("Cannot find the requested files in the"),
            Sign("cannot find the requested files in the local cache"),
            Sign("outgoing traffic has been disabled", weight=66, code="WE102"),
            Sign("is not cached locally and an error occurred"),
            Sign("Max retries exceeded with url", r"/api/models|/resolve/|huggingface|hf\.co|/api/datasets"),
            Sign("Failed to resolve", r"huggingface|hf\.co|cdn-lfs"),
            Sign("Connect", _NO_NET, within="huggingface_hub"),
            Sign("Timeout", _NO_NET, within="huggingface_hub"),
        ),
        "The job wants a file from the internet, and this machine has none, or is told to stay offline.",
        "Download it first where there is access (same HF_HOME), pass a local path, or set HF_ENDPOINT or a proxy.",
        ("hf download REPO", "echo $HF_HUB_OFFLINE $HF_ENDPOINT $HF_HOME"),
        "https://huggingface.co/docs/huggingface_hub/guides/download",
        weight=65,
    ),
    Rule(
        "wandb-login",
        "Weights & Biases has no key, and no terminal to ask for one",
        (
            Sign("api_key not configured"),
            Sign("No API key configured", r"(?i)wandb|wandb login"),
            Sign("API key verification failed"),
            Sign("API key must be", r"(?:Error|ERROR).*API key must be"),
            Sign("wandb.errors.AuthenticationError"),
            Sign(
                "wandb", r"(?:CommError|UsageError|AuthenticationError).*(?:permission|[Uu]nauthorized|401|login|key)"
            ),
        ),
        "report_to is wandb, and the library stops where it cannot log in.",
        "Log in once, set WANDB_API_KEY or WANDB_MODE=offline, or report to tensorboard.",
        ("wandb login", "export WANDB_MODE=offline"),
        weight=60,
    ),
)
