"""The Slurm script of docs/scale.md on two nodes that are this machine; `llamafactory-cli` starts torchrun on each."""

import re

import pytest
from omegaconf import OmegaConf

from support.cli import ROOT, history, run, train_in_processes
from support.warm import free_port

PAGE = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")
# srun runs its command once on each node.
SRUN = """#!/bin/bash
SLURM_NODEID=0 "$@" & SLURM_NODEID=1 "$@" && wait $!
"""


@pytest.mark.slow
def test_the_slurm_script_trains_as_two_processes(small_data, tmp_path):
    keys = dict(OmegaConf.load(ROOT / "examples" / "tiny_gpt2_full_ddm_sft.yaml"))
    keys |= {"model_name_or_path": str(ROOT / "data" / "tiny_gpt2"), "mask_token": 10, "dataset_dir": str(small_data)}
    keys |= {"max_steps": 2, "warmup_steps": 0, "logging_steps": 1, "eval_strategy": "no", "save_strategy": "no"}
    keys |= {"plot_loss": False, "use_cpu": True, "per_device_train_batch_size": 4, "overwrite_cache": True}
    by_slurm, by_torchrun = tmp_path / "slurm", tmp_path / "torchrun"
    OmegaConf.save({**keys, "output_dir": str(by_torchrun)}, tmp_path / "torchrun.yaml")
    OmegaConf.save({**keys, "output_dir": str(by_slurm)}, tmp_path / "x.yaml")
    (script,) = (text for text in re.findall(r"```sh\n(.*?)```", PAGE, re.S) if "#SBATCH" in text)
    (tmp_path / "job.sh").write_text(script.replace("29500", str(free_port())))
    for name, text in (("srun", SRUN), ("scontrol", "#!/bin/bash\necho 127.0.0.1\n")):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    at_first = f'PATH="{tmp_path}:$PATH" bash job.sh'
    env = {"SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "a,b", "NPROC_PER_NODE": "1"}
    done = run("-c", at_first, program="bash", env=env, cwd=tmp_path, fresh=True)
    assert "NOT ACTIVE" not in done.stdout + done.stderr
    train_in_processes(2, tmp_path / "torchrun.yaml")
    for a, b in zip(history(by_torchrun), history(by_slurm), strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-6)
