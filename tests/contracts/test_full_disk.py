"A disk that fills up in the middle of a run: one line, everything written before is readable, and the run goes on once there is room."
import subprocess, sys, textwrap
import pytest

NAMESPACE = ["unshare", "--user", "--mount", "--map-root-user", "sh", "-c"]


def own_disk(tmp_path) -> bool:
    try: return subprocess.run([*NAMESPACE, f"mount -t tmpfs -o size=1m tmpfs {tmp_path}"], capture_output=True).returncode == 0
    except FileNotFoundError: return False


STORY = textwrap.dedent("""
    import subprocess, sys
    from pathlib import Path
    import pandas as pd, torch
    from lal.analysis.runs import load_run
    LAL = [sys.executable, "-c", "from lal.app.cli import main; main()"]
    small = ["--set", "p=11", "--set", "epochs=60", "--set", "batch_size=16", "--set", "device=cpu", "--set", "checkpoint_every=5", "--set", "seeds=null"]
    disk, free = Path(sys.argv[1]), Path(sys.argv[2])
    full = subprocess.run([*LAL, "train", "quickstart", *small, "--root", disk], capture_output=True, text=True)
    lines = [line for line in full.stderr.splitlines() if line.startswith("lal: ")]
    assert full.returncode == 1 and len(lines) == 1 and "Traceback" not in full.stderr, full.stderr
    assert "No space left on device" in lines[0] and "make room, and resume" in lines[0], lines
    run = load_run("quickstart", disk)
    saved = run.epochs_saved
    assert saved and run.history.epoch.max() >= saved[-1] and not list(disk.rglob(".*.part"))
    for epoch in saved: run.checkpoint(epoch)
    print(lines[0])
    subprocess.run(["mount", "-o", "remount,size=200m", disk], check=True)
    subprocess.run([*LAL, "train", "quickstart", "--set", "seeds=null", "--resume", "--root", disk], check=True, capture_output=True)
    subprocess.run([*LAL, "train", "quickstart", *small, "--root", free], check=True, capture_output=True)
    one, two = (load_run("quickstart", root) for root in (disk, free))
    pd.testing.assert_frame_equal(one.history, two.history, check_exact=True)
    ours, theirs = (r.checkpoint(60)["model"] for r in (one, two))
    assert all(torch.equal(ours[k], theirs[k]) for k in theirs)
""")


def test_a_full_disk_stops_the_run_in_one_line_and_loses_nothing(tmp_path):
    disk, free = tmp_path / "disk", tmp_path / "free"
    disk.mkdir()
    if not own_disk(disk): pytest.skip("this machine lets nobody mount a small disk")
    (tmp_path / "story.py").write_text(STORY)
    command = f"mount -t tmpfs -o size=4m tmpfs {disk} && {sys.executable} {tmp_path}/story.py {disk} {free}"
    done = subprocess.run([*NAMESPACE, command], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
