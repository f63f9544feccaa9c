#!/bin/sh
# The small model from scratch to assets: autoencoder and reward model, stage 0 (ours), stages 1 to 3, evaluation.
# Every stage resumes where it stopped: run the same command again. RUNS, PYTHON, SEED, COUNT (prompts of an
# evaluation, for each of three seeds; 100 and one seed before stage 2) and ASSETS (a folder for the packed model) may be
# set. A second copy in the same folder waits for the first.
set -eu
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python}
RUNS=${RUNS:-runs/shapes}
SEED=${SEED:-0}
ASSETS=${ASSETS:-}
COUNT=${COUNT:-500}
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
mkdir -p "$RUNS"
exec 9> "$RUNS/.lock"
flock 9

[ -f "$RUNS/vae/world_vae.safetensors" ] && [ -f "$RUNS/reward/world_clip.safetensors" ] ||
    $PYTHON -m training world "$RUNS" --seed "$SEED"
[ -f "$RUNS/fresh/connector.safetensors" ] ||
    $PYTHON -m training new "$RUNS/fresh" --vae "$RUNS/vae" --seed "$SEED"

from=fresh
records=""
for stage in prior pretrain sft rgpo; do
    reward=""
    [ "$stage" = rgpo ] && reward="rgpo.reward_model=$RUNS/reward"
    [ -f "$RUNS/$stage/model/connector.safetensors" ] ||
        $PYTHON -m training "$stage" --config "training/configs/shapes-$stage.toml" seed="$SEED" \
            model="$RUNS/$from" out="$RUNS/$stage" data.cache_latents="$RUNS/latents" $reward
    from=$stage/model
    size="--n 100"
    case $stage in sft | rgpo) size="--n $COUNT --seeds 0 1 2" ;; esac
    # shellcheck disable=SC2086  # several words on purpose
    [ -f "$RUNS/evaluate-$stage.json" ] ||
        $PYTHON -m training evaluate "$RUNS/$from" $size --reward-model "$RUNS/reward" \
            --out "$RUNS/evaluate-$stage.json"
    records="$records --record $stage=$RUNS/evaluate-$stage.json --run $RUNS/$stage"
done

if [ -n "$ASSETS" ]; then
    $PYTHON -m training pack "$RUNS/rgpo/model" "$ASSETS" --dtype float16 $records
fi
