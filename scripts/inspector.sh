#!/bin/sh
# Installs the MCP Inspector into .inspector (which git ignores), for tests/test_inspector.py.
# It needs Node 22.19 or newer; where the system's is older, one is installed beside it.
set -eu
cd "$(dirname "$0")/.."

command -v npm >/dev/null || { echo "npm is needed: install Node 22.19 or newer" >&2; exit 1; }
packages="@modelcontextprotocol/inspector@2.12.0"
new_enough='const [a, b] = process.versions.node.split("."); process.exit(a > 22 || (a == 22 && b >= 19) ? 0 : 1)'
node -e "$new_enough" || packages="$packages node@22"
# shellcheck disable=SC2086 # two words where there are two packages
npm install --prefix .inspector --no-save --no-audit --no-fund --loglevel error $packages
