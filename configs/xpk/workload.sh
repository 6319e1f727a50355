#!/usr/bin/env bash
# The training as an XPK workload on a GKE cluster with spot TPUs.
#
#   PROJECT=my-project ZONE=us-east5-b CLUSTER=my-cluster IMAGE=…@sha256:… OUTPUT=gs://my-bucket/runs RUN_ID=gsm8k-1 \
#       bash configs/xpk/workload.sh --model-name Qwen/Qwen3-0.6B --dataset-name openai/gsm8k --dataset-config main
#
# `exec` hands bash's process over to the training, so that SIGTERM reaches it. Exit code 42 (preempted and saved) is
# restarted, and so is any code from 127 on, 130 (stopped by the user) included: to stop, delete the workload.
# Secrets come from the cluster (a Kubernetes secret, or Workload Identity with Secret Manager), never from --env.
# XPK_OPTIONS="--dry-run --output-manifest-file=jobset.yaml" writes the manifest and creates nothing.
set -euo pipefail

: "${PROJECT:?}" "${ZONE:?}" "${CLUSTER:?}" "${IMAGE:?}" "${OUTPUT:?}" "${RUN_ID:?}"
training=$(printf '%q ' "$@" --output-dir "$OUTPUT" --run-id "$RUN_ID")

# shellcheck disable=SC2086
exec xpk workload create \
    --project="$PROJECT" --zone="$ZONE" --cluster="$CLUSTER" --workload="$RUN_ID" \
    --tpu-type="${TPU:-v6e-16}" --num-slices="${SLICES:-1}" --docker-image="$IMAGE" \
    --max-restarts="${MAX_RESTARTS:-50}" --restart-on-exit-codes=42 --termination-grace-period-seconds=300 \
    --env PJRT_DEVICE=TPU --command="exec numina-finetune $training" ${XPK_OPTIONS:-}
