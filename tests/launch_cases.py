"""Launch cases: processes x devices x gpu_ids x CUDA_VISIBLE_DEVICES x machines x launchers, written out by hand.

Seats are the GPUs of this machine's ranks, `_` for a rank that finds none of its own; accelerate 0.33 and newer give
such a rank the device `local_rank % count` instead.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """One job and what becomes of it."""

    kind: str
    """distributed_type"""
    processes: int
    seats: str
    """The GPU of each rank of this machine; `_`: it finds none of its own."""
    gpus: int = 2
    ids: str | None = None
    """gpu_ids"""
    cvd: str | None = None
    """CUDA_VISIBLE_DEVICES"""
    machines: int = 1
    rank: int = 0
    standard: bool = False
    """deepspeed_multinode_launcher: standard"""
    command: str = ""
    """Judged by --launch instead of the file alone; `line` completes it."""
    codes: str = ""
    launcher: str = ""
    """Empty: the file's own, python for NO and torchrun for the others."""
    fixed: str = ""
    """`key value` of the repaired file, by commas; empty: no edit."""

    @property
    def name(self) -> str:
        parts = [f"{self.kind} {self.processes} on {self.gpus}"]
        parts += [f"gpu_ids {self.ids!r}"] if self.ids is not None else []
        parts += [f"CUDA_VISIBLE_DEVICES {self.cvd!r}"] if self.cvd is not None else []
        parts += [f"{self.rank} of {self.machines}"] if self.machines > 1 else []
        return ", ".join([*parts, self.command] if self.command else parts)

    @property
    def devices(self) -> tuple[int | None, ...]:
        return tuple(None if seat == "_" else int(seat) for seat in self.seats.split())

    @property
    def edits(self) -> dict[str, int | str]:
        pairs = [item.split() for item in self.fixed.split(", ") if item]
        return {key: int(value) if value.isdigit() else value for key, value in pairs}

    @property
    def line(self) -> str:
        """The command with accelerate's file and a script."""
        file = "accelerate launch --config_file accelerate_config.yaml"
        return f"{self.command.replace('accelerate launch', file)} train.py" if self.command else ""

    @property
    def text(self) -> str:
        """accelerate's file."""
        lines = [
            "compute_environment: LOCAL_MACHINE  # by hand",
            f"distributed_type: '{self.kind}'",
            "mixed_precision: bf16",
            f"num_machines: {self.machines}",
            f"machine_rank: {self.rank}",
            f"num_processes: {self.processes}",
        ]
        if self.ids is not None:
            lines.append(f"gpu_ids: '{self.ids}'")
        if self.machines > 1:
            lines += ["main_process_ip: 10.0.0.1", "main_process_port: 29500"]
        if self.kind == "DEEPSPEED":
            launcher = "\n  deepspeed_multinode_launcher: standard" if self.standard else ""
            lines.append(f"deepspeed_config:\n  gradient_accumulation_steps: 2\n  zero_stage: 2{launcher}")
        return "\n".join(lines) + "\n"

    @property
    def started_by(self) -> str:
        return self.launcher or ("python" if self.kind == "NO" else "torchrun")


REST = "-0000-0000-0000-000000000000"
ROWS = (
    Row("MULTI_GPU", 1, "0", gpus=1),
    Row("MULTI_GPU", 1, "0", codes="LA108"),
    Row("MULTI_GPU", 2, "0 _", gpus=1, codes="LA105", fixed="num_processes 1, distributed_type NO"),
    Row("MULTI_GPU", 2, "0 1"),
    Row("MULTI_GPU", 4, "0 1 _ _", codes="LA105", fixed="num_processes 2"),
    Row("MULTI_GPU", 8, "0 _ _ _ _ _ _ _", gpus=1, codes="LA105", fixed="num_processes 1, distributed_type NO"),
    Row("MULTI_GPU", 8, "0 1 _ _ _ _ _ _", codes="LA105", fixed="num_processes 2"),
    Row("MULTI_GPU", 8, "0 1 2 _ _ _ _ _", gpus=3, codes="LA105", fixed="num_processes 3"),
    Row("MULTI_GPU", 8, "0 1 2 3 4 5 6 7", gpus=8),
    Row("MULTI_GPU", 3, "0 1 2", gpus=8, codes="LA108"),
    Row("MULTI_GPU", 16, "0 1 2 3 4 5 6 7 _ _ _ _ _ _ _ _", gpus=8, codes="LA105", fixed="num_processes 8"),
    Row("MULTI_GPU", 7, "0 1 _ _ _ _ _", codes="LA105", fixed="num_processes 2"),
    Row("DEEPSPEED", 8, "0 _ _ _ _ _ _ _", gpus=1, codes="LA105",
        fixed="num_processes 1, deepspeed_config.gradient_accumulation_steps 16"),
    Row("DEEPSPEED", 8, "0 1 _ _ _ _ _ _", codes="LA105",
        fixed="num_processes 2, deepspeed_config.gradient_accumulation_steps 8"),
    Row("DEEPSPEED", 8, "0 1 2 3 _ _ _ _", gpus=4, codes="LA105",
        fixed="num_processes 4, deepspeed_config.gradient_accumulation_steps 4"),
    Row("DEEPSPEED", 2, "0 1", gpus=8, codes="LA108"),
    Row("DEEPSPEED", 8, "0 1 2 3 4 5 6 7", gpus=8),
    Row("DEEPSPEED", 6, "0 1 2 3 _ _", gpus=4, codes="LA105",
        fixed="num_processes 4, deepspeed_config.gradient_accumulation_steps 3"),
    Row("NO", 1, "0", codes="LA108"),
    Row("NO", 2, "0", codes="LA108"),
    Row("NO", 8, "0", gpus=1),
    Row("MULTI_GPU", 2, "_ _", gpus=0, codes="LA105"),
    Row("DEEPSPEED", 8, "_ _ _ _ _ _ _ _", gpus=0, codes="LA105"),
    Row("MULTI_GPU", 2, "0 1", ids="0,1"),
    Row("MULTI_GPU", 2, "1 0", ids="1,0"),
    Row("MULTI_GPU", 2, "0 1", ids="all"),
    Row("MULTI_GPU", 2, "0 _", ids="0", codes="LA105 LA115", fixed="num_processes 1, distributed_type NO"),
    Row("MULTI_GPU", 1, "0", ids="0", codes="LA115", fixed="distributed_type NO"),
    Row("MULTI_GPU", 1, "1", ids="1", codes="LA115", fixed="distributed_type NO"),
    Row("MULTI_GPU", 4, "2 3 _ _", gpus=4, ids="2,3", codes="LA105", fixed="num_processes 2"),
    Row("MULTI_GPU", 2, "2 3", gpus=4, ids="2,3"),
    Row("MULTI_GPU", 2, "0 _", gpus=4, ids="0,5", codes="LA105 LA106", fixed="num_processes 1, distributed_type NO"),
    Row("MULTI_GPU", 2, "_ _", gpus=4, ids="0,0", codes="LA105"),
    Row("MULTI_GPU", 2, "0 1", gpus=4, ids=" 0, 1"),
    Row("MULTI_GPU", 3, "0 1 2", gpus=8, ids="0,1,2"),
    Row("MULTI_GPU", 2, "0 1", gpus=8, ids="0,1,2", codes="LA108"),
    Row("MULTI_GPU", 2, "_ _", ids="", codes="LA105 LA115"),
    Row("MULTI_GPU", 2, "_ _", ids="cuda:0,cuda:1", codes="LA105"),
    Row("DEEPSPEED", 1, "3", gpus=4, ids="3"),
    Row("DEEPSPEED", 8, "1 2 _ _ _ _ _ _", gpus=4, ids="1,2", codes="LA105",
        fixed="num_processes 2, deepspeed_config.gradient_accumulation_steps 8"),
    Row("NO", 1, "3", gpus=4, ids="3"),
    Row("NO", 1, "_", ids="5", codes="LA105"),
    Row("MULTI_GPU", 2, "0 1", gpus=4, cvd="0,1"),
    Row("MULTI_GPU", 2, "3 _", gpus=4, cvd="3", codes="LA105", fixed="num_processes 1, distributed_type NO"),
    Row("MULTI_GPU", 2, "_ _", gpus=4, cvd="", codes="LA105"),
    Row("MULTI_GPU", 2, "_ _", gpus=4, cvd="-1", codes="LA105"),
    Row("MULTI_GPU", 2, "0 _", gpus=4, cvd="0,9,1", codes="LA105 LA106", fixed="num_processes 1, distributed_type NO"),
    Row("MULTI_GPU", 2, "_ _", gpus=4, cvd="0,0", codes="LA105"),
    Row("MULTI_GPU", 2, "1 _", gpus=4, cvd="1,x", codes="LA105 LA106", fixed="num_processes 1, distributed_type NO"),
    Row("MULTI_GPU", 4, "0 1 2 3", gpus=4, cvd="0,1,2,3"),
    Row("MULTI_GPU", 1, "2", gpus=4, cvd="2"),
    Row("MULTI_GPU", 2, "0 _", gpus=4, cvd="0 1", codes="LA105 EN101", fixed="num_processes 1, distributed_type NO"),
    Row("MULTI_GPU", 2, "2 3", gpus=4, cvd=" 2,3"),
    Row("MULTI_GPU", 2, "0 _", gpus=4, cvd="0;1", codes="LA105 EN101", fixed="num_processes 1, distributed_type NO"),
    Row("MULTI_GPU", 2, "1 0", gpus=4, cvd=f"GPU-00000001{REST},GPU-00000000{REST}"),
    Row("MULTI_GPU", 2, "1 3", gpus=4, cvd="GPU-00000001,GPU-00000003"),
    Row("MULTI_GPU", 2, "_ _", gpus=4, cvd="GPU-0000000", codes="LA105"),
    Row("MULTI_GPU", 2, "_ _", gpus=4, cvd="GPU-deadbeef", codes="LA105"),
    Row("MULTI_GPU", 2, "_ _", gpus=4, cvd="all", codes="LA105"),
    Row("MULTI_GPU", 2, "_ _", gpus=4, cvd="NoDevFiles", codes="LA105"),
    Row("MULTI_GPU", 2, "2 3", gpus=4, ids="2,3", cvd="0,1", codes="EN103"),
    Row("MULTI_GPU", 2, "0 1", gpus=4, ids="all", cvd="0,1"),
    Row("MULTI_GPU", 8, "0 1 2 3", gpus=4, machines=2),
    Row("DEEPSPEED", 8, "0 1 2 3", gpus=4, machines=2, standard=True),
    Row("MULTI_GPU", 8, "0 1 2 3", gpus=4, machines=2, rank=1),
    Row("MULTI_GPU", 8, "0 1 _ _", machines=2, rank=1, codes="LA105", fixed="num_processes 4"),
    Row("MULTI_GPU", 6, "0 2", gpus=4, ids="0,2", machines=3, rank=2),
    Row("MULTI_GPU", 2, "0 1 2 3", gpus=4, command="accelerate launch --num_processes 4"),
    Row("MULTI_GPU", 8, "0", gpus=4, command="accelerate launch --num-processes=1", codes="LA108"),
    Row("MULTI_GPU", 2, "1 3", gpus=4, command="accelerate launch --gpu_ids 1,3"),
    Row("MULTI_GPU", 2, "1 _", gpus=4, command="accelerate launch --gpu_ids 1", codes="LA105 LA115",
        fixed="num_processes 1, distributed_type NO"),
    Row("MULTI_GPU", 1, "0 1", gpus=4, command="accelerate launch --multi_gpu --num_processes 2", codes="LA108"),
    Row("MULTI_GPU", 1, "0 1", gpus=4, command="accelerate launch --use_deepspeed --num_processes 2 --zero_stage 2",
        codes="LA108"),
    Row("MULTI_GPU", 2, "_", gpus=4, command="accelerate launch --cpu", launcher="python"),
    Row("MULTI_GPU", 2, "0 1", gpus=4, command="accelerate launch --main_process_port 29511", codes="LA108"),
    Row("MULTI_GPU", 2, "0 1 _ _ _ _ _ _", gpus=4, command="accelerate launch --num_processes 8 --gpu_ids 0,1",
        codes="LA105"),
    Row("MULTI_GPU", 2, "0 1", gpus=4, command="accelerate launch --mixed_precision fp16", codes="LA108"),
    Row("NO", 1, "0 1 2 3", gpus=4, command="torchrun --nproc_per_node 4", launcher="torchrun"),
    Row("NO", 1, "0 1 2 3 _ _ _ _", gpus=4, command="torchrun --nproc-per-node=8", codes="LA105", launcher="torchrun"),
    Row("NO", 1, "0 1 2 3", gpus=4, command="torchrun --nproc_per_node gpu", launcher="torchrun"),
    Row("NO", 1, "0", gpus=4, command="torchrun --nproc_per_node 1", launcher="torchrun"),
    Row("NO", 1, "0 1", gpus=4, command="torchrun --standalone --nproc_per_node 2", launcher="torchrun"),
    Row("NO", 1, "0 1 2 3", gpus=4,
        command="torchrun --nnodes 2 --nproc_per_node 4 --node_rank 1 --master_addr 10.0.0.1 --master_port 29500",
        launcher="torchrun"),
    Row("NO", 1, "0 1 2 3 _ _ _ _", gpus=4, command="deepspeed --num_gpus 8", codes="LA105", launcher="deepspeed"),
    Row("NO", 1, "0 1", gpus=4, command="deepspeed --num_gpus 2", launcher="deepspeed"),
    Row("NO", 1, "1 3", gpus=4, command="deepspeed --include localhost:1,3", launcher="deepspeed"),
    Row("NO", 1, "0 1 2 3", gpus=4, command="deepspeed", launcher="deepspeed"),
    Row("MULTI_GPU", 4, "0 1 _ _", gpus=4, command="CUDA_VISIBLE_DEVICES=0,1 accelerate launch", codes="LA105",
        fixed="num_processes 2"),
)  # fmt: skip
