"""Make the MLflow user that serving reads the registry with, with the password of its secret; twice is harmless.

A user without grants of its own has `default_permission` of mlflow_auth.ini: READ.
"""

import os
import sys

import requests

server, name, password = (os.environ[variable] for variable in ("MLFLOW_TRACKING_URI", "READER", "READER_PASSWORD"))
admin = os.environ["MLFLOW_TRACKING_USERNAME"], os.environ["MLFLOW_TRACKING_PASSWORD"]


def ask(method: str, what: str, login: tuple[str, str] = admin, **body: str | bool) -> requests.Response:
    given = {"params": body} if method == "GET" else {"json": body}
    return requests.request(method, f"{server}/api/2.0/mlflow/users/{what}", auth=login, timeout=60, **given)


if name == admin[0]:
    sys.exit(f"Error: READER = {name!r}: is the administrator, who may change everything. Allowed: another name")
if ask("GET", "get", username=name).status_code == 404:
    ask("POST", "create", username=name, password=password).raise_for_status()
else:  # the secret may be a new one
    ask("PATCH", "update-password", username=name, password=password).raise_for_status()
    ask("PATCH", "update-admin", username=name, is_admin=False).raise_for_status()
ask("GET", "get", (name, password), username=name).raise_for_status()
print(f"{name} reads from {server}")
