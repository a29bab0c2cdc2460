#!/bin/sh
# Makes, into made/ beside this file (git ignores it), a token for each role and Redis' password, and of them what
# kustomization.yaml takes. What is there already stays, so that it can be edited: docs/security.md says how tokens are
# exchanged. Taken from the environment, where set: SAPO_REDIS_URL (components/external-redis), HF_TOKEN (components/hub).
set -eu
umask 077
mkdir -p "$(dirname "$0")/made"
cd "$(dirname "$0")/made"

once() { # file: from standard input, unless it is there
    if [ -s "$1" ]; then cat >/dev/null; else cat >"$1.new" && mv "$1.new" "$1"; fi
}
roles="admin learner worker viewer"
for name in $roles redis_password; do
    head -c 64 /dev/urandom | base64 | tr -dc A-Za-z0-9 | cut -c 1-40 | tr -d '\n' | once "$name"
done
for role in $roles; do echo "$role: $(cat "$role")"; done | once tokens
echo "REDIS_PASSWORD=$(cat redis_password)" | once secret.env
given() { # variable, its value
    [ -n "$2" ] || return 0
    if ! grep -q "^$1=" secret.env; then
        echo "$1=$2" >>secret.env
    elif ! grep -qxF "$1=$2" secret.env; then
        echo "made/secret.env has another $1 already: edit it there" >&2 && exit 1
    fi
}
given SAPO_REDIS_URL "${SAPO_REDIS_URL:-}"
given HF_TOKEN "${HF_TOKEN:-}"
