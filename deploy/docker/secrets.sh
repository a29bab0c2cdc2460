#!/bin/sh
# Makes what nobody should have to invent, once, into the volume that is the working directory: the run's token, the passwords
# of Redis and Grafana. SAPO_TOKEN, REDIS_PASSWORD and GRAFANA_PASSWORD, where set, are taken instead. Every value is a file
# that is there whole or not at all; who may read them is decided by who has the volume.
set -eu
umask 022

write() { cat >"$1.new" && mv "$1.new" "$1"; }
secret() { # file, value given or ""
    if [ -n "$2" ]; then
        printf %s "$2" | write "$1"
    elif [ ! -s "$1" ]; then
        head -c 64 /dev/urandom | base64 | tr -dc A-Za-z0-9 | head -c 40 | write "$1"
    fi
}

secret sapo_token "${SAPO_TOKEN:-}"
secret redis_password "${REDIS_PASSWORD:-}"
secret grafana_password "${GRAFANA_PASSWORD:-}"
case $(cat redis_password) in
    *[!A-Za-z0-9_-]*) echo "REDIS_PASSWORD may hold letters, digits, _ and - alone: it becomes part of a URL" >&2 && exit 2 ;;
esac
echo "requirepass $(cat redis_password)" | write redis.conf
echo "redis://:$(cat redis_password)@redis:6379/0" | write sapo_redis_url
