"""A template imported from an OCI image layout: layers, whiteouts, environment, directory, entrypoint."""
import gzip
import hashlib
import io
import json
import pathlib
import subprocess
import tarfile

import pytest
from torpor import ApiFailure, Machine, call, wait_for

NAME = "e2e-import"


def program_and_libraries(*programs):
    """Programs of this host and what they are linked with: a root file system of a few MiB."""
    files = set()
    for program in programs:
        path = subprocess.check_output(["sh", "-c", f"command -v {program}"], text=True).strip()
        files.add(path)
        linked = subprocess.check_output(["ldd", path], text=True)
        files.update(word for line in linked.splitlines() for word in line.split() if word.startswith("/"))
    return sorted(files)


def add(archive, name, content, mode=0o644):
    info = tarfile.TarInfo(name)
    info.size, info.mode = len(content), mode
    archive.addfile(info, io.BytesIO(content))


def layer(fill):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        fill(archive)
    return gzip.compress(buffer.getvalue(), 1)


def base_layer(archive):
    for path in program_and_libraries("sh", "cat", "sleep"):
        # Both /bin and /usr/bin, whichever of them is the link here.
        for place in {path, path.replace("/usr/bin/", "/bin/"), path.replace("/usr/lib", "/lib")}:
            add(archive, place.lstrip("/"), pathlib.Path(path).read_bytes(), 0o755)
    add(archive, "etc/passwd", b"root:x:0:0:root:/root:/bin/sh\n")
    add(archive, "etc/group", b"root:x:0:\n")
    add(archive, "srv/gone", b"gone")
    add(archive, "srv/kept", b"kept")


def upper_layer(archive):
    add(archive, "srv/.wh.gone", b"")
    add(archive, "srv/new", b"new")


@pytest.fixture(scope="module")
def layout(tmp_path_factory):
    root = tmp_path_factory.mktemp("image")

    def put(content, kind, **more):
        digest = hashlib.sha256(content).hexdigest()
        (root / "blobs/sha256").mkdir(parents=True, exist_ok=True)
        (root / "blobs/sha256" / digest).write_bytes(content)
        return {"mediaType": f"application/vnd.oci.image.{kind}", "digest": f"sha256:{digest}",
                "size": len(content), **more}
    config = {"architecture": "amd64", "os": "linux", "rootfs": {"type": "layers", "diff_ids": []},
              "config": {"Env": ["GREETING=hello"], "WorkingDir": "/srv",
                         "Entrypoint": ["/bin/sh", "-c", "echo $GREETING > /srv/started; exec sleep 10000"]}}
    manifest = {"schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
                "config": put(json.dumps(config).encode(), "config.v1+json"),
                "layers": [put(layer(base_layer), "layer.v1.tar+gzip"), put(layer(upper_layer), "layer.v1.tar+gzip")]}
    platform = {"os": "linux", "architecture": "amd64"}
    index = {"schemaVersion": 2, "manifests": [put(json.dumps(manifest).encode(), "manifest.v1+json",
                                                   platform=platform)]}
    (root / "index.json").write_text(json.dumps(index))
    (root / "oci-layout").write_text('{"imageLayoutVersion":"1.0.0"}')
    return root


def torpor(*arguments):
    return subprocess.run(["torpor", *arguments], capture_output=True, text=True)


def test_an_image_becomes_a_template_whose_machines_are_what_it_says(layout):
    done = torpor("template", "import", str(layout), "--name", NAME, "--size", "512M")
    assert done.returncode == 0, done.stderr
    try:
        listed = {one["name"]: one for one in call("GET", "/v1/templates")["templates"]}
        assert listed[NAME]["disk_mib"] == 512
        machine = Machine(template=NAME)
        try:
            assert machine.sh("cat kept new; echo $GREETING") == "keptnewhello\n"
            assert machine.exec("cat", "/srv/gone")["exit_code"] != 0
            wait_for(lambda: machine.exec("cat", "/srv/started")["stdout"] == "hello\n", "the entrypoint ran")
            machine.pause()
            assert machine.sh("cat /srv/started") == "hello\n"
            refused = torpor("template", "rm", NAME)
            assert refused.returncode == 1 and machine.id in refused.stderr
        finally:
            machine.delete()
        again = torpor("template", "import", str(layout), "--name", NAME)
        assert again.returncode == 1 and "already" in again.stderr
    finally:
        assert torpor("template", "rm", NAME).returncode == 0
    assert NAME not in {one["name"] for one in call("GET", "/v1/templates")["templates"]}
    with pytest.raises(ApiFailure) as refused:
        Machine(template=NAME)
    assert refused.value.code == "template_not_found"
