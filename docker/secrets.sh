#!/bin/sh
# Writes a random value for each secret of compose.yaml that has none; what is there stays. `make secrets` calls it.
set -eu
folder=${1:-$(dirname "$0")/secrets}
umask 077
mkdir -p "$folder"
# Compose mounts the files as they are, and the users of the containers have other ids than you: they must be able to read the
# files. Others on this machine are kept out by the folder.
chmod 700 "$folder"

write() {
    [ -s "$folder/$1" ] && return
    printf '%s' "$2" >"$folder/$1"
    chmod 444 "$folder/$1"
    echo "  $folder/$1"
}

random() { od -An -N24 -tx1 /dev/urandom | tr -d ' \n'; }

for name in postgres_password prefect_db_password mlflow_db_password mlflow_admin_password mlflow_serve_password mlflow_session_key s3_access_key s3_secret_key serve_key; do
    write "$name" "$(random)"
done
write prefect_auth "admin:$(random)"
# The address that alerts are sent to is yours to give.
[ -e "$folder/alert_webhook" ] || { : >"$folder/alert_webhook"; chmod 644 "$folder/alert_webhook"; }
