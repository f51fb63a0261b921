#!/bin/sh
# Runs inside an image build: installs the packages of a lock into an environment of their own.
#
#   install_locked.sh ENVIRONMENT LOCK [TOOLS]
#
# What installs (uv) comes from requirements-build.lock beside this script; it is removed
# afterwards, or stays in the folder TOOLS. The build secret `ca_bundle`, when given, is trusted
# instead of the system's certificates.
set -eu

environment=$1
lock=$2
tools=${3:-/tmp/build-tools}

certificates=/run/secrets/ca_bundle
[ -s "$certificates" ] || certificates=/etc/ssl/certs/ca-certificates.crt
export PIP_CERT="$certificates" SSL_CERT_FILE="$certificates"

python3 -m venv "$tools"
"$tools/bin/pip" install --quiet --disable-pip-version-check --no-cache-dir --require-hashes \
    --requirement "$(dirname "$0")/requirements-build.lock"

# Byte code is compiled now: a read-only root file system leaves no later moment.
"$tools/bin/uv" venv --quiet --no-cache --no-python-downloads --python python3 "$environment"
# A lock has everything; what it overrides is not asked again.
"$tools/bin/uv" pip install --quiet --no-cache --no-deps --require-hashes --compile-bytecode \
    --python "$environment/bin/python" --requirement "$lock"

[ $# -eq 3 ] || rm -rf "$tools"
