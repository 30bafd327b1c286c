"""The two SDKs, unmodified, from PyPI, as images/host installs them; and what `torpor env` says for them."""
import os
import subprocess


def use(sdk):
    """Point the SDK at this host as eval "$(torpor env SDK)" would; whoever set its variables by hand keeps them."""
    prefix = {"morph": "MORPH_", "nullspace": "NULLSPACE_"}[sdk]
    # The SDK reads the host's certificates once per connection pool, of which it makes 64.
    os.environ.setdefault("MORPH_HTTP_TRANSPORT_SHARDS", "2")
    if os.environ.get(f"{prefix}API_KEY"):
        return
    script = f'eval "$(torpor env {sdk})"; env -0'
    out = subprocess.run(["sh", "-c", script], check=True, capture_output=True).stdout.decode()
    os.environ.update(line.split("=", 1) for line in out.split("\0") if "=" in line)


def cli(group, *words):
    """A line of an SDK's own command-line tool, in this process: its imports take a minute in the virtual host."""
    from click.testing import CliRunner
    done = CliRunner().invoke(group, list(words), env={"NO_COLOR": "1", "COLUMNS": "200"})
    assert done.exit_code == 0, f"{words}\n{done.output[-3000:]}\n{done.exception!r}"
    return done.output
