"""Images and compose file as far as they go without a container engine: linters and schema, rules, scripts, install steps, real servers."""

from __future__ import annotations

import base64
import contextlib
import os
import pwd
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import tomllib
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from tasks.core.registry import Registry, champion_files
from tasks.core.settings import load_settings
from tasks.core.tracking import open_parent

REPOSITORY = Path(__file__).resolve().parents[1]
DOCKER = REPOSITORY / "docker"
COMPOSE = yaml.safe_load((DOCKER / "compose.yaml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
JOBS = {"bucket", "deploy", "reader"}
TARGETS = {"cpu", "gpu", "mlflow", "serve"}
BIN = Path(sys.executable).parent
WITHIN_S = 400  # how long a server may take on a machine that is busy


def stages() -> dict[str, list[tuple[str, str]]]:
    """Instructions of each stage of the Dockerfile, `FROM` first; lines that go on are joined."""
    text = re.sub(r"^#.*\n", "", (DOCKER / "Dockerfile").read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    found: dict[str, list[tuple[str, str]]] = {}
    for line in filter(None, map(str.strip, text.splitlines())):
        instruction, _, rest = line.partition(" ")
        if instruction == "FROM":
            found[rest.split(" AS ")[1]] = current = []
        current.append((instruction, " ".join(rest.split())))
    return found


def lineage(stage: str) -> list[tuple[str, str]]:
    """Instructions of a stage and of those it is built on; not of those that it only copies from."""
    own = stages()[stage]
    base = own[0][1].split(" AS ")[0]
    return (lineage(base) if base in stages() else []) + own


# Linters and rules.


@pytest.mark.fast
def test_the_dockerfile_and_the_scripts_pass_their_linters() -> None:
    done = subprocess.run([BIN / "hadolint", DOCKER / "Dockerfile"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    ignored = set(re.findall(r"hadolint ignore=(\S+)", (DOCKER / "Dockerfile").read_text()))
    assert ignored == {"DL3008"}  # the reason stands at the head of the file
    for script in DOCKER.glob("*.sh"):
        assert os.access(script, os.X_OK) and subprocess.run(["sh", "-n", script]).returncode == 0


@pytest.mark.fast
@pytest.mark.slow
def test_the_compose_file_fits_the_compose_specification(tmp_path: Path) -> None:
    def check(path: Path) -> subprocess.CompletedProcess[str]:
        command = [BIN / "check-jsonschema", "--builtin-schema", "vendor.compose-spec", path]
        return subprocess.run(command, capture_output=True, text=True)

    assert check(DOCKER / "compose.yaml").returncode == 0, check(DOCKER / "compose.yaml").stdout
    wrong = tmp_path / "compose.yaml"
    wrong.write_text((DOCKER / "compose.yaml").read_text().replace("restart: unless-stopped", "restart_policy: unless-stopped"))
    assert check(wrong).returncode == 1


@pytest.mark.fast
def test_every_target_is_there_runs_without_rights_and_holds_no_build_tools() -> None:
    found = stages()
    assert set(found) >= TARGETS
    for target in TARGETS:
        instructions = lineage(target)
        assert ("USER", "10001:10001") in instructions, target
        assert any("useradd --uid 10001" in rest for name, rest in instructions if name == "RUN")
        assert any(name == "HEALTHCHECK" for name, _ in instructions) == (target in ("mlflow", "serve"))
        text = " ".join(rest for name, rest in instructions if name == "RUN")
        assert not re.search(r"build-essential|\bg\+\+|\bgcc|-dev\b|\bgit\b|\bmake\b|pip install", text), text


@pytest.mark.fast
def test_a_virtual_environment_is_copied_to_where_it_was_made_for_the_same_python() -> None:
    found = stages()
    for target in TARGETS:
        copied = [rest for name, rest in found[target] if name == "COPY" and rest.endswith("/opt/venv")]
        assert copied == [f"--from={target}-venv /opt/venv /opt/venv"]
        bases = [found[stage][0][1].split(" AS ")[0] for stage in (target, f"{target}-venv")]
        assert bases[0] == bases[1]
        if target != "mlflow":
            assert ("COPY", "--from=llama /opt/llama.cpp /opt/llama.cpp") in found[target]
            assert ("COPY", f"--from={target}-venv /app /app") in found[target]


@pytest.mark.fast
def test_versions_in_the_images_are_those_of_the_project() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *(line for extra in project["optional-dependencies"].values() for line in extra)]
    lock = (REPOSITORY / "requirements.lock").read_text().splitlines()

    def pins(lines: list[str]) -> dict[str, str]:
        split = [re.match(r"([\w.-]+)(?:\[\w+\])?==([\w.]+)", line) for line in lines]
        return {pin[1].lower().replace("_", "-"): pin[2] for pin in split if pin}

    known = pins(lock) | pins(wanted)
    written = re.findall(r"[\w.-]+(?:\[\w+\])?==[\w.]+", (DOCKER / "Dockerfile").read_text())
    assert len(written) > 15
    for name, version in pins(written).items():
        assert known[name.replace("mlflow-skinny", "mlflow")] == version, name


@pytest.mark.fast
def test_bases_and_images_are_pinned() -> None:
    bases = {found[0][1].split(" AS ")[0] for found in stages().values()} - set(stages())
    foreign = {service["image"] for service in SERVICES.values() if "build" not in service}
    assert len(bases) == 2 and len(foreign) == 2
    for image in bases | foreign:
        tag = image.partition("@")[0].partition(":")[2]
        assert re.match(r"\d+\.\d+", tag), image
        assert "@" not in image or re.fullmatch(r".*@sha256:[0-9a-f]{64}", image), image


@pytest.mark.fast
@pytest.mark.parametrize("name", SERVICES)
def test_every_service_is_limited_watched_and_closed_to_other_machines(name: str) -> None:
    service = SERVICES[name]
    limits = service["deploy"]["resources"]["limits"]
    assert limits["cpus"] and limits["memory"]
    assert service["logging"]["options"]["max-size"] and "no-new-privileges:true" in service["security_opt"]
    assert set(service["networks"]) <= set(COMPOSE["networks"])
    if name in JOBS:
        assert service["restart"].startswith("on-failure") and "test" not in service.get("healthcheck", {})
    else:
        assert service["restart"] == "unless-stopped" and service["healthcheck"]["test"] and service["healthcheck"]["interval"]
        answers = "--with-healthcheck" in service.get("command", [])
        assert answers == (":8080/health" in service["healthcheck"]["test"][-1])
    for port in service.get("ports", []):
        assert re.fullmatch(r"127\.0\.0\.1:\d+:\d+", port), port
    for other, condition in service.get("depends_on", {}).items():
        assert condition["condition"] == ("service_completed_successfully" if other in JOBS else "service_healthy")
    if "build" in service:
        assert service["build"]["target"] in TARGETS and service["cap_drop"] == ["ALL"]


@pytest.mark.fast
@pytest.mark.parametrize("name", SERVICES)
def test_secrets_come_from_declared_files_and_stand_nowhere_else(name: str) -> None:
    service = SERVICES[name]
    assert set(service.get("secrets", [])) <= set(COMPOSE["secrets"])
    for variable, value in service.get("environment", {}).items():
        if value.startswith("/run/secrets/"):
            assert variable.endswith("_FILE") and value.rpartition("/")[2] in service["secrets"], variable
        else:
            assert not re.search(r"PASSWORD|SECRET|_KEY|AUTH_STRING|TOKEN|WEBHOOK", variable), variable
            assert not re.search(r"://[^/]*:[^/]*@", value), variable  # an address with a password in it
    assert not re.search(r"password|secret_key|\$\(", " ".join(service.get("command", [])), re.IGNORECASE)


@pytest.mark.fast
def test_make_secrets_writes_what_compose_wants_once_and_git_does_not_see_it(tmp_path: Path) -> None:
    folder = tmp_path / "secrets"
    subprocess.run([DOCKER / "secrets.sh", folder], check=True, capture_output=True)
    written = {path.name: path.read_text() for path in folder.iterdir()}
    assert {entry["file"] for entry in COMPOSE["secrets"].values()} == {f"./secrets/{name}" for name in written}
    assert written.pop("alert_webhook") == "" and written["prefect_auth"].startswith("admin:")
    assert len(set(written.values())) == len(written) and all(len(value) >= 48 for value in written.values())
    assert folder.stat().st_mode & 0o777 == 0o700
    assert all((folder / name).stat().st_mode & 0o777 == 0o444 for name in written)
    (folder / "serve_key").unlink()
    subprocess.run([DOCKER / "secrets.sh", folder], check=True, capture_output=True)
    changed = {name for name in written if (folder / name).read_text() != written[name]}
    assert changed == {"serve_key"}
    ignored = subprocess.run(["git", "check-ignore", "-q", "docker/secrets/serve_key"], cwd=REPOSITORY)
    assert ignored.returncode == 0 and "docker/secrets" in (REPOSITORY / ".dockerignore").read_text()


def with_secrets(folder: Path, command: list[str], **variables: str) -> subprocess.CompletedProcess[str]:
    env = {"PATH": os.environ["PATH"], "SECRETS_FOLDER": str(folder), **variables}
    return subprocess.run([DOCKER / "with_secrets.sh", *command], capture_output=True, text=True, env=env)


@pytest.mark.fast
def test_the_wrapper_hands_over_secrets_and_leaves_other_files_alone(tmp_path: Path) -> None:
    (tmp_path / "key").write_text('a\'b "c" $HOME `id` \\d\n')
    (tmp_path / "nothing").write_text("")
    done = with_secrets(
        tmp_path,
        ["env"],
        MY_KEY_FILE=f"{tmp_path}/key",
        SSL_CERT_FILE="/etc/ssl/cert.pem",
        HOOK_OPTIONAL_FILE=f"{tmp_path}/nothing",
        URL_OPTIONAL_FILE=f"{tmp_path}/key",
    )
    lines = done.stdout.splitlines()
    assert 'MY_KEY=a\'b "c" $HOME `id` \\d' in lines and 'URL=a\'b "c" $HOME `id` \\d' in lines
    assert "SSL_CERT_FILE=/etc/ssl/cert.pem" in lines and not [line for line in lines if line.startswith(("HOOK", "MY_KEY_FILE"))]


@pytest.mark.fast
@pytest.mark.parametrize(("content", "says"), [(None, "cannot be read"), ("", "is empty")])
def test_the_wrapper_starts_nothing_without_its_secret(tmp_path: Path, content: str | None, says: str) -> None:
    if content is not None:
        (tmp_path / "key").write_text(content)
    done = with_secrets(tmp_path, ["touch", f"{tmp_path}/started"], PASSWORD_FILE=f"{tmp_path}/key")
    assert done.returncode == 78 and f"PASSWORD_FILE = {tmp_path}/key: {says}" in done.stderr and "make secrets" in done.stderr
    assert not (tmp_path / "started").exists()


# Real servers.


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def status(url: str, login: str | None = None, host: str | None = None, data: bytes | None = None) -> int:
    """The HTTP status of a request, with basic authentication by `user:password` where it is given; 0 without an answer."""
    headers = {"Content-Type": "application/json"}
    if login:
        headers["Authorization"] = "Basic " + base64.b64encode(login.encode()).decode()
    if host:
        headers["Host"] = host
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data, headers), timeout=30) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0


@contextmanager
def running(command: list[str], env: Mapping[str, str], folder: Path, url: str) -> Iterator[None]:
    """A server in a process group of its own, from when `url` answers."""
    with (folder / f"{Path(command[0]).name}.log").open("ab") as log:
        server = subprocess.Popen(command, env=dict(env), cwd=folder, stdout=log, stderr=log, start_new_session=True)
    try:
        deadline = time.monotonic() + WITHIN_S
        while status(url) != 200:
            assert server.poll() is None and time.monotonic() < deadline, Path(log.name).read_text()[-3000:]
            time.sleep(0.3)
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, 15)
        try:
            server.wait(15)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, 9)
            server.wait()


@pytest.fixture(scope="module")
def secrets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("docker") / "secrets"
    subprocess.run([DOCKER / "secrets.sh", folder], check=True, capture_output=True)
    return folder


def environment_of(service: str, secrets: Path, folder: Path, replace: Mapping[str, str]) -> dict[str, str]:
    """What compose.yaml gives a service, with the addresses and folders of this machine."""
    here = {"/run/secrets": str(secrets), "/tmp": str(folder), **replace}
    places = re.compile("|".join(map(re.escape, here)))
    values = {name: places.sub(lambda found: here[found[0]], value) for name, value in SERVICES[service]["environment"].items()}
    return {"PATH": f"{BIN}:{os.environ['PATH']}", "HOME": str(folder), "SECRETS_FOLDER": str(secrets), **values}


def postgres_programs() -> Path | None:
    """The folder of PostgreSQL's server programs, which Debian keeps off PATH."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    on_path = shutil.which("initdb")
    return found[-1].parent if found else Path(on_path).resolve().parent if on_path else None


@pytest.fixture(scope="module")
def postgres(secrets: Path) -> Iterator[int]:
    """The port of a PostgreSQL on loopback, whose databases databases.sql has made; it wants passwords."""
    programs = postgres_programs()
    if programs is None or shutil.which("psql") is None:
        pytest.skip("there is no PostgreSQL on this machine")
    other: dict[str, Any] = {}
    if os.getuid() == 0:  # it refuses to run as root
        name = next((name for name in ("postgres", "nobody") if name in {user.pw_name for user in pwd.getpwall()}), None)
        if name is None:
            pytest.skip("PostgreSQL refuses to run as root, and there is no other user")
        other = {"user": name, "group": pwd.getpwnam(name).pw_gid, "extra_groups": []}
    port = free_port()
    with tempfile.TemporaryDirectory() as made:  # pytest's own folder is closed to other users
        folder = Path(made)
        if other:
            shutil.chown(folder, other["user"])
        subprocess.run(
            [programs / "initdb", "-D", folder / "data", "-U", "postgres", "--auth-host=scram-sha-256", "--auth-local=trust", "--no-sync"],
            check=True,
            capture_output=True,
            cwd=folder,
            **other,
        )
        command = [programs / "postgres", "-D", folder / "data", "-h", "127.0.0.1", "-p", str(port), "-k", folder, "-c", "fsync=off"]
        server = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **other)
        try:
            script = folder / "databases.sql"
            script.write_text((DOCKER / "databases.sql").read_text().replace("/run/secrets", str(secrets)))
            psql = ["psql", "-h", str(folder), "-p", str(port), "-U", "postgres", "-v", "ON_ERROR_STOP=1"]
            deadline = time.monotonic() + WITHIN_S
            while subprocess.run([*psql, "-c", "select 1"], capture_output=True).returncode and time.monotonic() < deadline:
                time.sleep(0.2)
            done = subprocess.run([*psql, "-f", script], capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            yield port
        finally:
            server.send_signal(2)
            server.wait(30)


def test_prefects_server_keeps_its_records_in_postgresql_and_wants_a_password(postgres: int, secrets: Path, tmp_path: Path) -> None:
    port, wanted = free_port(), (secrets / "prefect_auth").read_text()
    env = environment_of("prefect", secrets, tmp_path, {"postgres:5432": f"127.0.0.1:{postgres}", ":4200": f":{port}"})
    command = [str(DOCKER / "with_secrets.sh"), *(str(part) for part in SERVICES["prefect"]["command"])]
    command = [{"0.0.0.0": "127.0.0.1", "4200": str(port)}.get(part, part) for part in command]
    address = f"http://127.0.0.1:{port}"
    with running(command, env, tmp_path, f"{address}/api/health"):
        assert status(f"{address}/api/flows/filter", data=b"{}") == 401
        assert status(f"{address}/api/flows/filter", "admin:guess", data=b"{}") == 401
        assert status(f"{address}/api/flows/filter", wanted, data=b"{}") == 200
        assert status(f"{address}/api/work_pools/", wanted, data=b'{"name": "cpu-pool", "type": "process"}') == 201
        assert status(f"{address}/") == 200 and list((tmp_path / "prefect-ui").iterdir())
    assert not list(tmp_path.rglob("*.db"))


def mlflow_command(port: int, folder: Path, postgres: int | None = None) -> list[str]:
    """The command of the image, for this machine; without a PostgreSQL on SQLite."""
    (line,) = [rest for name, rest in stages()["mlflow"] if name == "CMD"]
    backend = f"postgresql://mlflow@127.0.0.1:{postgres}/mlflow" if postgres else f"sqlite:///{folder}/mlflow.db"
    here = {
        "0.0.0.0": "127.0.0.1",
        "5000": str(port),
        "2": "1",
        "postgresql://mlflow@postgres:5432/mlflow": backend,
        "s3://mlflow/artifacts": str(folder / "artifacts"),
    }
    return [str(DOCKER / "with_secrets.sh"), *(here.get(part, part) for part in yaml.safe_load(line))]


def mlflow_environment(secrets: Path, folder: Path, database: str) -> dict[str, str]:
    users = folder / "mlflow_auth.ini"
    text = (DOCKER / "mlflow_auth.ini").read_text().replace("postgresql://mlflow@postgres:5432/mlflow_auth", database)
    users.write_text(text)
    # Unlike the image, the project's environment has litellm: without a network, its import hangs while it asks for prices.
    image = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    here = {"MLFLOW_AUTH_CONFIG_PATH": str(users), "LITELLM_LOCAL_MODEL_COST_MAP": "True", **image}
    return environment_of("mlflow", secrets, folder, {}) | here


def check_mlflow(address: str, password: str) -> None:
    asked = f"{address}/api/2.0/mlflow/experiments/search?max_results=5"
    assert status(asked) == 401 and status(asked, "admin:guess") == 401
    assert status(asked, f"admin:{password}") == 200
    assert status(f"{address}/api/2.0/mlflow/experiments/create", f"admin:{password}", data=b'{"name": "shop"}') == 200
    assert status(f"{address}/") == 401  # the dashboard too
    assert status(asked, f"admin:{password}", host="mlflow:5000") == 200  # as workers call it
    assert status(asked, f"admin:{password}", host="elsewhere.example") == 403


def test_mlflows_server_keeps_its_records_and_users_in_postgresql(postgres: int, secrets: Path, tmp_path: Path) -> None:
    port = free_port()
    env = mlflow_environment(secrets, tmp_path, f"postgresql://mlflow@127.0.0.1:{postgres}/mlflow_auth")
    with running(mlflow_command(port, tmp_path, postgres), env, tmp_path, f"http://127.0.0.1:{port}/health"):
        check_mlflow(f"http://127.0.0.1:{port}", (secrets / "mlflow_admin_password").read_text())
    assert not list(tmp_path.rglob("*.db"))


@pytest.mark.fast
def test_only_what_makes_models_may_change_them() -> None:
    with_password = {name for name, service in SERVICES.items() if "mlflow_admin_password" in service.get("secrets", [])}
    assert with_password == {"mlflow", "deploy", "orchestrator", "worker-cpu", "worker-gpu", "reader"}


def test_serving_has_a_user_that_loads_the_champion_and_may_change_nothing(
    secrets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = free_port()
    address = f"http://127.0.0.1:{port}"

    def sign_in(service: str) -> None:
        for variable in ("USERNAME", "PASSWORD"):
            value = SERVICES[service]["environment"].get(f"MLFLOW_TRACKING_{variable}")
            file = SERVICES[service]["environment"].get(f"MLFLOW_TRACKING_{variable}_FILE", "")
            monkeypatch.setenv(f"MLFLOW_TRACKING_{variable}", value or (secrets / Path(file).name).read_text())

    def make_reader() -> str:
        env = environment_of("reader", secrets, tmp_path, {"http://mlflow:5000": address})
        command = [str(DOCKER / "with_secrets.sh"), "python", str(DOCKER / "make_reader.py")]
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    env = mlflow_environment(secrets, tmp_path, f"sqlite:///{tmp_path}/users.db")
    with running(mlflow_command(port, tmp_path), env, tmp_path, f"{address}/health"):
        sign_in("worker-cpu")
        settings = load_settings()
        tracker, registry = open_parent(settings, "domain/base", "key", "run", {}), Registry(settings)
        file, spec = tmp_path / "model.gguf", tmp_path / "spec.yaml"
        for written in (file, spec):
            written.write_text("x")
        run = tracker.child("gguf-F16", "key", "variant")
        logged = tracker.log_model(run, "gguf-F16", "digest", {"model": file, "spec": spec}, "llama_cpp")
        registry.register("shop", logged, "digest", {}, "")
        registry.promote("shop", "1", lambda: "")
        assert make_reader() == make_reader() == f"serve reads from {address}\n"

        sign_in("serve")
        client, source = registry.client, f"models:/{logged}"
        into = tmp_path / "into"
        into.mkdir()
        assert champion_files(settings, "shop", into)[0].read_text() == "x"
        for change in (
            lambda: client.set_registered_model_alias("shop", "champion", "1"),
            lambda: client.delete_registered_model_alias("shop", "champion"),
            lambda: client.create_model_version("shop", source),
            lambda: client.set_model_version_tag("shop", "1", "cartwright.files.0", "{}"),
            lambda: client.delete_model_version("shop", "1"),
            lambda: client.delete_registered_model("shop"),
            lambda: client.log_text(run, "x", "said.txt"),
            lambda: client.delete_logged_model(logged),
            lambda: client.delete_run(run),
            lambda: client.delete_experiment(client.get_run(run).info.experiment_id),
        ):
            with pytest.raises(Exception, match=r"(?i)permission.denied|403"):
                change()
        client.create_registered_model("another")  # what READ does not keep from anybody: mlflow_auth.ini says so
        sign_in("worker-cpu")
        assert registry.champion("shop") == {**registry.version("shop", None)}

        (secrets / "mlflow_serve_password").chmod(0o644)  # a new secret is a new password
        (secrets / "mlflow_serve_password").write_text("another-secret-of-serving")
        assert status(f"{address}/api/2.0/mlflow/users/get?username=serve", "serve:another-secret-of-serving") == 401
        make_reader()
        assert status(f"{address}/api/2.0/mlflow/users/get?username=serve", "serve:another-secret-of-serving") == 200


@pytest.mark.slow
def test_make_up_puts_records_on_postgresql_and_files_on_s3(postgres: int, secrets: Path, s3: dict[str, str], tmp_path: Path) -> None:
    def address(database: str, driver: str = "") -> str:
        password = (secrets / f"{database}_db_password").read_text()
        return f"postgresql{driver}://{database}:{password}@127.0.0.1:{postgres}/{database}"

    home, ports = tmp_path / "home", (free_port(), free_port())
    env = {
        **os.environ,
        "CARTWRIGHT_HOME": str(home),
        "PYTHONPATH": str(REPOSITORY),
        "PREFECT_API_DATABASE_CONNECTION_URL": address("prefect", "+asyncpg"),
        "CARTWRIGHT_MLFLOW_BACKEND": address("mlflow"),
        "CARTWRIGHT_MLFLOW_ARTIFACTS": f"s3://shop/{tmp_path.name}",
        **s3,
    }
    log = """
import sys, boto3, mlflow
client = mlflow.MlflowClient(sys.argv[1])
client.log_text(client.create_run(client.create_experiment(sys.argv[2])).info.run_id, "two shoes", "said.txt")
found = boto3.client("s3").list_objects_v2(Bucket="shop", Prefix=sys.argv[2])["Contents"]
print([file["Key"].rpartition("/")[2] for file in found])
"""

    def cartwright(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-m", "flows.cli", *arguments], capture_output=True, text=True, env=env, cwd=REPOSITORY)

    try:
        started = cartwright("up", "--prefect-port", str(ports[0]), "--mlflow-port", str(ports[1]))
        assert started.returncode == 0, started.stdout + started.stderr
        assert status(f"http://127.0.0.1:{ports[0]}/api/health") == 200 and status(f"http://127.0.0.1:{ports[1]}/health") == 200
        logged = [sys.executable, "-c", log, f"http://127.0.0.1:{ports[1]}", tmp_path.name]
        assert "said.txt" in subprocess.run(logged, env=env, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
        assert not list(home.rglob("*.db")) and not list(home.rglob("said.txt"))
    finally:
        cartwright("down")


@pytest.mark.thorough
def test_the_install_steps_of_the_mlflow_image_give_a_server_that_wants_a_password(secrets: Path, tmp_path: Path) -> None:
    """The RUN lines of the build stage as they stand, with another folder for the virtual environment."""
    venv = tmp_path / "venv"
    steps = [rest for name, rest in stages()["mlflow-venv"] if name == "RUN"]
    env = {**os.environ, "PATH": f"{venv}/bin:{BIN}:{os.environ['PATH']}", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    for step in steps:
        command = step.replace("/opt/venv", str(venv))
        assert command != step
        done = subprocess.run(["sh", "-euc", command], cwd=REPOSITORY, env=env, capture_output=True, text=True)
        if "No matching distribution found" in done.stderr or "NewConnectionError" in done.stderr:
            pytest.skip("there is no package index: " + done.stderr.strip().splitlines()[-1])
        assert done.returncode == 0, done.stderr[-3000:]
    assert not list(venv.glob("lib/*/site-packages/torch")) and not list(venv.glob("lib/*/site-packages/prefect"))
    port = free_port()
    env = mlflow_environment(secrets, tmp_path, f"sqlite:///{tmp_path}/users.db") | {"PATH": f"{venv}/bin:/usr/bin:/bin"}
    with running(mlflow_command(port, tmp_path), env, tmp_path, f"http://127.0.0.1:{port}/health"):
        check_mlflow(f"http://127.0.0.1:{port}", (secrets / "mlflow_admin_password").read_text())
