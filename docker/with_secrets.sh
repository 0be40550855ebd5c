#!/bin/sh
# Starts a command with secrets in its environment: NAME_FILE=/run/secrets/x becomes NAME, the content of that file. A file that
# is missing or empty is an error: a server without its password would start without protection. NAME_OPTIONAL_FILE may be empty.
# Other variables that end in _FILE, such as SSL_CERT_FILE, are left alone. No secret stands on a command line, where `ps` and
# `docker inspect` would show it.
set -eu
folder=${SECRETS_FOLDER:-/run/secrets}

refuse() {
    echo "Error: $1_FILE = $2: $3. Allowed: a file below $folder. \`make secrets\` writes those that are missing" >&2
    exit 78
}

for name in $(env | sed -n 's/^\([A-Za-z_][A-Za-z0-9_]*\)_FILE=.*/\1/p'); do
    eval "file=\$${name}_FILE"
    case $file in "$folder"/*) ;; *) continue ;; esac
    [ -r "$file" ] || refuse "$name" "$file" "cannot be read"
    value=$(cat "$file")
    unset "${name}_FILE"
    case $name in
        *_OPTIONAL) [ -n "$value" ] || continue ;;
        *) [ -n "$value" ] || refuse "$name" "$file" "is empty" ;;
    esac
    export "${name%_OPTIONAL}=$value"
done
exec "$@"
