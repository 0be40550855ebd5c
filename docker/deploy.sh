#!/bin/sh
# What stands in deployments/ comes onto the Prefect server: pools, deployments, automations. Twice is harmless, but a schedule
# that was switched on in the UI is then as the file has it.
set -eu
for pool in orchestrator cpu-pool gpu-pool; do
    prefect work-pool inspect "$pool" >/dev/null 2>&1 || prefect work-pool create "$pool" --type process
done
prefect --no-prompt deploy --all --prefect-file deployments/prefect.yaml
python -c 'from flows.automations import install; print(install())'
