"Runs killed by SIGKILL, at random and in the middle of writing, end where they would have ended. `tests/killed.py --rounds 20` does more of it."
import subprocess, sys
from pathlib import Path


def test_killed_runs_end_where_they_would_have_ended():
    script = Path(__file__).parents[1] / "killed.py"
    done = subprocess.run([sys.executable, script, "--rounds", "3", "--seed", "0"], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0 and "all equal to runs that nobody killed" in done.stdout, done.stdout + done.stderr
    assert "3 runs killed 0 times" not in done.stdout
