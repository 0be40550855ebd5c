"""Where things are on this machine. The only module that reads or sets the process environment."""

from __future__ import annotations

import base64
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit, urlunsplit

from tasks.domain.errors import UserError

# Third parties are quiet, private, and do not look for a network on their own.
_QUIET = {
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "DO_NOT_TRACK": "1",
    "PREFECT_LOGGING_LEVEL": "ERROR",
    "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",
    "PREFECT_CLI_COLORS": "false",
    "PREFECT_SERVER_LOGGING_LEVEL": "ERROR",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_LOGGING_LEVEL": "ERROR",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # two lines for every run that ends
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "GIT_PYTHON_REFRESH": "quiet",
    # With fewer workers than 2 GPTQModel 7.6 refuses to start: "Virtual pool 'model_loader:cpu' requests 2 workers".
    "GPTQMODEL_CPU_WORKERS": "2",
    "MPLBACKEND": "Agg",
    "CUDA_DEVICE_ORDER": "PCI_BUS_ID",  # as NVML numbers them; CUDA's own order is by speed, and another GPU's memory would be read
}


# What MLflow's records can be kept at; a path has no scheme. A database's may name its driver: `postgresql+psycopg2`.
MLFLOW_SERVERS = ("http", "https", "databricks")
MLFLOW_DATABASES = ("postgresql", "mysql", "mssql", "sqlite")

# glibc gives large blocks back to the kernel at once, and a training step that takes them anew pays for every page: about a
# seventh of its time. Kept, and in huge pages, they cost nothing. Not for measurements: memory that is kept counts as used.
_REUSE_MEMORY = {
    "MALLOC_MMAP_THRESHOLD_": str(1 << 32),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 33),
    "MALLOC_TOP_PAD_": str(1 << 28),
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}


@dataclass(frozen=True)
class Settings:
    """The places Cartwright reads and writes. Everything is below `home` unless the environment says otherwise."""

    home: Path
    store_uri: str
    mlflow_uri: str
    prefect_api_url: str | None
    prefect_home: Path
    llama_cpp: Path
    texts_uri: str

    @property
    def reports(self) -> Path:
        return self.home / "reports"


def load_settings() -> Settings:
    """Read `CARTWRIGHT_HOME`, `CARTWRIGHT_STORE`, `MLFLOW_TRACKING_URI`, `PREFECT_API_URL`, `PREFECT_HOME`, `CARTWRIGHT_LLAMA_CPP` and `CARTWRIGHT_TEXTS`.

    Raises:
        UserError: MLflow knows no such address.
    """
    _take_passwords_out_of_addresses()
    env = os.environ
    _check_scheme(env.get("MLFLOW_TRACKING_URI", ""))
    home = Path(env.get("CARTWRIGHT_HOME") or ".cartwright").absolute()
    return Settings(
        home=home,
        store_uri=env.get("CARTWRIGHT_STORE") or (home / "store").as_uri(),
        mlflow_uri=env.get("MLFLOW_TRACKING_URI") or f"sqlite:///{home / 'mlflow.db'}",
        prefect_api_url=env.get("PREFECT_API_URL") or None,
        prefect_home=Path(env.get("PREFECT_HOME") or home / "prefect").expanduser().absolute(),
        llama_cpp=Path(env.get("CARTWRIGHT_LLAMA_CPP") or installed_llama_cpp()),
        texts_uri=env.get("CARTWRIGHT_TEXTS") or str(home / "texts" / "*.jsonl"),
    )


def installed_llama_cpp() -> Path:
    """Where `make install` puts llama.cpp's converter."""
    return Path(sys.prefix) / "share" / "llama.cpp"


def check_home(settings: Settings) -> None:
    """Raise UserError unless the home is a folder that can be written, or can be made. Nothing is made."""
    problem = ""
    try:
        settings.home.stat()
    except FileNotFoundError:  # as before the first run, or a link that leads nowhere
        pass
    except OSError as error:
        problem = f"cannot be used ({error.strerror})"
    there = next(path for path in (settings.home, *settings.home.parents) if os.path.lexists(path))
    if not there.is_dir():
        problem = f"{'is' if there == settings.home else f'is below {there}, which is'} no folder"
    elif not problem and not os.access(there, os.W_OK | os.X_OK):
        problem = "cannot be written" if there == settings.home else f"cannot be made: {there} cannot be written"
    if problem:
        mend = "Set it to a folder, or to one that can be made, mend the permissions, or unset it: it is .cartwright by default"
        raise UserError("CARTWRIGHT_HOME", str(settings.home), problem, mend=mend)


def _take_passwords_out_of_addresses() -> None:
    """Prefect keeps what an error says, and the job variables of pools, where everyone reads them: user and password of a server's address
    are moved to the variables of their own that MLflow's and Prefect's clients read. A database's address has no such variables."""
    for name, variables in (
        ("MLFLOW_TRACKING_URI", ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD")),
        ("PREFECT_API_URL", ("PREFECT_API_AUTH_STRING",)),
    ):
        address = urlsplit(os.environ.get(name, ""))
        who, at, host = address.netloc.rpartition("@")
        if not at or address.scheme not in ("http", "https"):
            continue
        os.environ[name] = urlunsplit(address._replace(netloc=host))
        user, _, password = who.partition(":")
        taken = (unquote(user), unquote(password)) if len(variables) == 2 else (f"{unquote(user)}:{unquote(password)}",)
        if not any(os.environ.get(variable) for variable in variables):  # what is said there goes before
            os.environ.update(zip(variables, taken, strict=True))


def _check_scheme(address: str) -> None:
    """MLflow would quote the whole address, password and all, in an error that Prefect keeps."""
    scheme, colon, _ = address.partition(":")
    kind, _, driver = scheme.lower().partition("+")
    known = (kind in MLFLOW_DATABASES and "+" not in driver) or scheme.lower() in (*MLFLOW_SERVERS, "file")
    if not colon or known or "/" in scheme or scheme.lower() in _schemes_of_plugins():
        return
    raise UserError(
        "MLFLOW_TRACKING_URI",
        f"{scheme}:..."
        if re.fullmatch(r"[A-Za-z][\w+.-]*", scheme)
        else "...",  # not even without its password: where that is in an address that is no right one, nobody can tell
        "is of a kind that MLflow does not know",
        allowed=[*MLFLOW_SERVERS, *MLFLOW_DATABASES, "a database with its driver such as postgresql+psycopg2", "a path"],
        mend="A PostgreSQL database is postgresql://...",
    )


def _schemes_of_plugins() -> set[str]:
    import importlib.metadata

    return {plugin.name for plugin in importlib.metadata.entry_points(group="mlflow.tracking_store")}


def mlflow_storage(settings: Settings) -> tuple[str, str]:
    """Where an MLflow server keeps its records and its files: `CARTWRIGHT_MLFLOW_BACKEND` (a database) and `CARTWRIGHT_MLFLOW_ARTIFACTS`
    (a folder or `s3://`), by default below the home; the records are those of runs without a server."""
    backend = os.environ.get("CARTWRIGHT_MLFLOW_BACKEND") or f"sqlite:///{settings.home / 'mlflow.db'}"
    return backend, os.environ.get("CARTWRIGHT_MLFLOW_ARTIFACTS") or (settings.home / "mlflow-artifacts").as_uri()


def prepare_environment(settings: Settings) -> None:
    """Set defaults for third parties; must run before they are imported. What the user set stays."""
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    os.environ.setdefault("PREFECT_HOME", str(settings.prefect_home))
    os.environ["CARTWRIGHT_HOME"] = str(settings.home)


def set_prefect_api(url: str | None) -> None:
    """Point this process and its children at a Prefect API, or at none."""
    if url:
        os.environ["PREFECT_API_URL"] = url
    else:
        os.environ.pop("PREFECT_API_URL", None)


def source_on_workers(here: Path) -> str:
    """Where workers find these sources: `CARTWRIGHT_SOURCE`, by default the folder they are in here."""
    return os.environ.get("CARTWRIGHT_SOURCE") or str(here)


def prefect_authorization() -> dict[str, str]:
    """The header that a Prefect server with a password wants, from `PREFECT_API_AUTH_STRING` (`user:password`); none without."""
    secret = os.environ.get("PREFECT_API_AUTH_STRING")
    return {"Authorization": f"Basic {base64.b64encode(secret.encode()).decode()}"} if secret else {}


def given_credentials() -> list[str]:
    """The variables with user and password of MLflow's and Prefect's servers that are set."""
    names = ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN", "PREFECT_API_AUTH_STRING", "PREFECT_API_KEY")
    return [name for name in names if os.environ.get(name)]


def without_secrets(text: str) -> str:
    """A text of ours or an error's without what `without_known_secrets` finds, users of addresses, and whatever else looks like a key."""
    text = shown_uri(without_known_secrets(text))
    return re.sub(r"\b(?:sk|pk|rk)[-_][\w*-]{6,}|(?<=Bearer )[\w.*-]+", "***", text)  # providers quote keys in part


def without_known_secrets(text: str) -> str:
    """A text in which no value of an environment variable that holds a key, token, secret or password is left, neither as it is nor as
    Python writes it: a client quotes a header that it cannot send. For answers, where what only looks like a key may be an order's number."""
    names = [name for name in os.environ if re.search(r"KEY|TOKEN|SECRET|PASSWORD|CREDENTIAL|AUTH_STRING|WEBHOOK", name.upper())]
    values = [value for name in names if len(value := os.environ[name].strip()) >= 8]  # of a file often with its line break
    written = {form for value in values for form in (value, repr(value)[1:-1], repr(os.fsencode(value))[2:-1])}
    for form in sorted(written, key=len, reverse=True):
        text = text.replace(form, "***")
    return text


# User and password of an address. Of one of the web they end before its path; keys of S3 and passwords of databases may have slashes.
_LOGIN = re.compile(
    r"(?P<scheme>https?://)(?P<web>[^/\s]*)@|(?P<other>\b(?!https?:)[a-z][\w+.-]*://)(?P<login>[^/\s:]*:\S*|[^/\s]*)@", re.IGNORECASE
)

_SECRET_IN_QUERY = r"[?&][^=&\s]*(?:password|passwd|secret|token)[^=&\s]*="  # as PostgreSQL takes it


def shown_uri(uri: str) -> str:
    """An address, or a text with some, as it may be shown: without users and passwords."""
    shown = _LOGIN.sub(lambda found: f"{found['scheme'] or found['other']}***@", uri)
    return re.sub(rf"({_SECRET_IN_QUERY})[^&\s'\"]*", r"\1***", shown, flags=re.IGNORECASE)


def has_password(uri: str) -> bool:
    """Whether an address holds a password, or a token in the place of a user: before its host, or in its query."""
    login = _LOGIN.search(uri)
    secret = login and (login["scheme"] or ":" in login["login"])  # a user of a database is no secret
    return bool(secret or re.search(_SECRET_IN_QUERY, uri, re.IGNORECASE))


def asked_threads() -> int | None:
    """OMP_NUM_THREADS, at least 1; of a list, which has one for each level of nesting, the first. None if it is no number."""
    asked = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    return max(int(asked), 1) if asked.isascii() and asked.isdigit() else None


def cpp_compiler() -> str:
    """The C++ compiler of torch.compile: `CXX`, by default g++ (torch/_inductor/config.py, `cpp.cxx`)."""
    return os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")


def visible_gpus() -> str | None:
    """Which GPUs CUDA is allowed to see, in its order, `CUDA_VISIBLE_DEVICES`; None for all."""
    return os.environ.get("CUDA_VISIBLE_DEVICES")


TEACHER_KEY = "CARTWRIGHT_TEACHER_KEY"


def teacher_key() -> str | None:
    """The key a parent handed to this process for the teacher; None where the provider's own variable holds it."""
    return os.environ.get(TEACHER_KEY, "").strip() or None


def serve_key() -> str | None:
    """The key that clients of `cartwright serve` have to send, `CARTWRIGHT_SERVE_KEY`; None where none is asked for."""
    return os.environ.get("CARTWRIGHT_SERVE_KEY") or None


def give_up_soon() -> None:
    """A server that does not answer is one for half a minute, not for the many minutes that MLflow tries by default."""
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")


def alert_webhook() -> str | None:
    """Where alerts go: an address that takes JSON by POST. It is a secret: whoever knows it can write there."""
    return os.environ.get("CARTWRIGHT_ALERT_WEBHOOK") or None


def child_environment(reuse_memory: bool = False) -> dict[str, str]:
    """The environment of a child process: ours, with defaults for third parties. `python` is the one that runs here."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    return {**_QUIET, **(_REUSE_MEMORY if reuse_memory else {}), **os.environ, "PATH": path, "PYTHONUNBUFFERED": "1"}


def team_environment() -> dict[str, str]:
    """The environment of servers, workers and the runs they start."""
    return {
        **child_environment(),
        "PREFECT_LOGGING_LEVEL": "INFO",  # a run's lines are read in the UI, what went wrong in the logs
        "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "INFO",
        "PREFECT_SERVER_LOGGING_LEVEL": "WARNING",
        "PREFECT_WORKER_QUERY_SECONDS": os.environ.get("PREFECT_WORKER_QUERY_SECONDS", "1"),
        "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",
    }


def replace_environment(environment: Mapping[str, str]) -> None:
    """Give this process the environment it would have been started with."""
    os.environ.clear()
    os.environ.update(environment)
