#!/bin/sh
# Makes what nobody should have to invent, once, into the volumes that are the working directory (of the services that own the
# run), its worker/ and its grafana/: tokens with their roles, the passwords of Redis and Grafana. SAPO_TOKEN, REDIS_PASSWORD
# and GRAFANA_PASSWORD, where set, are taken instead. Every value is a file that is there whole or not at all; who may read
# them is decided by who has the volume.
set -eu
umask 022

refuse() { echo "$1" >&2 && exit 2; }
case ${REDIS_PASSWORD:-} in
    *[!A-Za-z0-9_-]*) refuse "REDIS_PASSWORD may hold letters, digits, _ and - alone: it becomes part of a URL" ;;
esac
case ${SAPO_TOKEN:-} in
    "" | ????????????????*) ;;
    *) refuse "SAPO_TOKEN must have at least 16 characters; 'openssl rand -hex 24' makes one" ;;
esac

write() { cat >"$1.new" && mv "$1.new" "$1"; }
secret() { # file, value given or ""
    if [ -n "$2" ]; then
        printf %s "$2" | write "$1"
    elif [ ! -s "$1" ]; then
        head -c 64 /dev/urandom | base64 | tr -dc A-Za-z0-9 | head -c 40 | write "$1"
    fi
}

mkdir -p worker grafana
secret sapo_token "${SAPO_TOKEN:-}"
secret worker/sapo_token ""
secret redis_password "${REDIS_PASSWORD:-}"
secret grafana/password "${GRAFANA_PASSWORD:-}"
printf 'admin: %s\nworker: %s\n' "$(cat sapo_token)" "$(cat worker/sapo_token)" | write tokens
echo "requirepass $(cat redis_password)" | write redis.conf
echo "redis://:$(cat redis_password)@redis:6379/0" | write sapo_redis_url
