"""Causes: the files that say how the job is launched and trained."""

from __future__ import annotations

from xflux_doctor.explain.rule import Rule, Sign

_CONFIG = r"\b(?:cfg|config|conf|args|opt|params|hparams|settings)\w*(?:\.\w+)*(?:\[['\"]\w+['\"]\])*\["
_YAML = r"\byaml\.(?:parser\.ParserError|scanner\.ScannerError|composer\.|constructor\.)"
_ACCELERATE = r"accelerate/commands/config/"
_EXTRA = r"Extra inputs are not permitted|extra fields not permitted"
_DS_CONFIG = r"DeepSpeed\w*Config"
_DS_PLUGIN = r"HfDeepSpeedConfig|DeepSpeedPlugin|in is_zero|find_config_node|deepspeed_plugin|utils/deepspeed\.py"
"""accelerate's reading of a DeepSpeed file (utils/deepspeed.py, utils/dataclasses.py)."""
_DS_INLINE = (
    r"ACCELERATE_(?:DEEPSPEED|GRADIENT)_\w+|DeepSpeedPlugin|in __post_init__[\s\S]*(?:zero_stage|zero3|clipping)"
)
"""accelerate's reading of its own deepspeed_config, which comes to the ranks in variables."""
_DS = "https://www.deepspeed.ai/docs/config-json/"
_ACC_DS = "https://huggingface.co/docs/accelerate/usage_guides/deepspeed"

RULES: tuple[Rule, ...] = (
    Rule(
        "accelerate-config-unknown-keys",
        "the accelerate config has keys that this accelerate does not know",
        (
            Sign("had unknown keys"),
            Sign("Config.__init__() got an unexpected keyword argument", r"(?:Cluster|SageMaker|Base)Config\.__init__"),
            Sign(
                "__init__() got an unexpected keyword argument",
                within=r"accelerate/commands/config/config_args\.py",
                weight=55,
            ),
        ),
        "The file was written by another release of accelerate, or a key is misspelt.",
        "Delete the named keys, or install the accelerate release that wrote the file.",
        ("xflux-doctor fix", "accelerate config update --config_file FILE"),
        weight=60,
    ),
    Rule(
        "config-missing-key",
        "the config file or the command line lacks a key, or cannot be read",
        (
            Sign("ConfigAttributeError"),
            Sign("ConfigKeyError"),
            Sign("MissingMandatoryValue"),
            Sign("Missing mandatory value"),
            Sign("yaml.", _YAML),
            Sign("yaml.", _YAML, within=_ACCELERATE, weight=51, code="LA101"),
            Sign("unrecognized arguments: "),
            Sign("the following arguments are required"),
            Sign(": error: argument "),
            Sign("ClusterConfig.__init__() missing", code="LA104"),
            Sign("must be specified in the config file", code="LA104"),
            Sign("using this config yaml", code="LA104"),
            Sign("is not a valid DistributedType", code="LA104"),
            Sign("is not a valid PrecisionType", code="LA104"),
            Sign("Unknown mixed_precision mode", code="LA104"),
            Sign("is not a valid DynamoBackend", code="LA203"),
            Sign("Unknown dynamo backend", code="LA203"),
            Sign("KeyError: ", within=r"ShardingStrategy|BackwardPrefetch|FSDP_\w+", weight=51, code="LA203"),
            Sign("is not in list", r"ValueError: ", within="FSDP_SHARDING_STRATEGY", weight=51, code="LA203"),
            Sign("Less than two GPU ids were configured", code="LA115"),
            Sign("Mesh should not be bigger than default world size", within="accelerate/", code="LA206"),
            Sign("product of parallelism sizes", code="LA206"),
            Sign("The passed configuration file", code="LA101"),
            Sign(
                "has no attribute 'lower'",
                r"'bool' object has no attribute 'lower'",
                within=r"accelerate/",
                code="LA104",
            ),
            Sign("'Namespace' object has no attribute"),
            Sign("No such file or directory", r"No such file or directory: '[^']*\.ya?ml'"),
            Sign("KeyError: ", r"^(?:\[\w+\]: ?)?KeyError: ", within=_CONFIG, weight=45),
            Sign("JSONDecodeError", within=r"config", weight=45),
            Sign("__init__() missing", within=r"[Cc]onfig", weight=40),
            Sign(
                "__init__() got an unexpected keyword argument",
                r"\w*(?:Config|Args|Arguments|Params)\.__init__",
                weight=34,
            ),
        ),
        "What the trainer asks for is not in the file, or not under the name that it looks for.",
        "Add or correct the key or argument that the message names; mind indentation and tabs in YAML.",
        ("xflux-doctor check",),
        weight=50,
    ),
    Rule(
        "deepspeed-config-mismatch",
        "the DeepSpeed config contradicts itself or the trainer",
        (
            Sign("Check batch related parameters"),
            Sign("modes cannot be simultaneously enabled", code="LA311"),
            Sign("validation error", r"validation errors? for DeepSpeed", code="LA310"),
            Sign("xtra ", _EXTRA, within=_DS_CONFIG, weight=61, code="LA308"),
            Sign("Cannot provide deprecated parameter", code="LA309"),
            Sign("Please specify the ZeRO optimization config", code="LA307"),
            Sign("object has no attribute 'get'", within=_DS_PLUGIN, code="LA307"),
            Sign("invalid literal for int()", within=_DS_INLINE, code="LA304"),
            Sign("could not convert string to float", within=_DS_INLINE, code="LA304"),
            Sign("invalid truth value", within=_DS_INLINE, code="LA304"),
            Sign("JSONDecodeError", within=r"deepspeed|hf_ds_config", weight=55, code="LA301"),
            Sign("in the config file and in the code at the same time", code="LA313"),
            Sign("requires you to pass at least one of training or evaluation dataloaders"),
            Sign(
                "has to be greater than",
                r"(?:[Tt]rain batch size|Micro batch size|Gradient accumulation steps).*has to be",
            ),
            Sign("Either train_batch_size or train_micro_batch_size_per_gpu"),
            Sign("accelerate config variables will be ignored", code="LA302"),
            Sign("DeepSpeedConfigError"),
            Sign("Please correct the following DeepSpeed config values"),
            Sign("xpected a string path to an existing deepspeed config", code="LA301"),
            Sign("ZeRO-Offload with a client provided optimizer"),
            Sign("untested ZeRO Optimizer"),
            Sign("is not a valid ZeroStageEnum", code="LA310"),
        ),
        "DeepSpeed checks its numbers first: train_batch_size must be micro batch × accumulation × ranks, for example.",
        "Correct the value that the message names, or leave it out (`auto`) so that it follows from the others.",
        ("xflux-doctor check",),
        _DS,
        weight=60,
    ),
    Rule(
        "deepspeed-multiple-models",
        "more than one model was prepared for one DeepSpeed engine",
        (
            Sign("instance with multiple models when using DeepSpeed"),
            Sign("multiple models", r"(?i)deepspeed.*multiple models"),
        ),
        "One Accelerator has one DeepSpeed engine, and that engine has one model.",
        "Pass only the trained model to accelerator.prepare, and move the VAE and the text encoders by hand.",
        (),
        _ACC_DS,
        weight=60,
    ),
)
