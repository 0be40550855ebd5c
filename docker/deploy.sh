#!/bin/sh
# What stands in deployments/ comes onto the Prefect server: pools, deployments, automations. Twice is harmless.
set -eu
exec cartwright deploy
