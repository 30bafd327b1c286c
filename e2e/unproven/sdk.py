"""The two SDKs, unmodified, from PyPI, in an environment of their own; and what `torpor env` says for them."""
import os
import pathlib
import subprocess
import sys

PINNED = ["morphcloud==0.1.116", "nullspace-sdk==1.0.3", "websocket-client"]
VENV = pathlib.Path("/var/tmp/torpor-sdk-venv")


def _packages(bin_dir):
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    return bin_dir.parent / "lib" / version / "site-packages"


def use(sdk):
    """Make the SDK importable here, and point it at this host as eval "$(torpor env SDK)" would.

    A developer who sets the SDK's variables by hand runs against that host, with the packages at hand.
    """
    prefix = {"morph": "MORPH_", "nullspace": "NULLSPACE_"}[sdk]
    if os.environ.get(f"{prefix}API_KEY"):
        return
    done = VENV / "installed"
    if not done.exists():
        subprocess.run([sys.executable, "-m", "venv", VENV], check=True)
        subprocess.run([VENV / "bin/python", "-m", "pip", "install", "--quiet", *PINNED], check=True)
        done.write_text("\n".join(PINNED))
    packages = str(_packages(VENV / "bin"))
    if packages not in sys.path:
        sys.path.insert(0, packages)
    script = f'eval "$(torpor env {sdk})"; env -0'
    out = subprocess.run(["sh", "-c", script], check=True, capture_output=True).stdout.decode()
    os.environ.update(line.split("=", 1) for line in out.split("\0") if "=" in line)


def cli(group, *words):
    """A line of an SDK's own command-line tool, in this process: its imports take a minute in the virtual host."""
    from click.testing import CliRunner
    done = CliRunner().invoke(group, list(words), env={"NO_COLOR": "1", "COLUMNS": "200"})
    assert done.exit_code == 0, f"{words}\n{done.output[-3000:]}\n{done.exception!r}"
    return done.output
