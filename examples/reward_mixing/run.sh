#!/usr/bin/env bash
# Trains each mixture with each seed, from the repository's root: examples/reward_mixing/run.sh [OPTIONS OF FIT]
# A run that is complete is passed over, and one that was stopped goes on. JOBS runs go side by side.
set -euo pipefail

export OUT=${OUT:-runs/reward_mixing}
MIXTURES=${MIXTURES:-1:0:0 0:1:0 0:0:1 1:1:0 1:0:1 0:1:1 1:1:1}  # weights of OCR : small : red
SEEDS=${SEEDS:-0 1}
JOBS=${JOBS:-1}

train() {
    IFS=: read -r ocr small red <<<"$1"
    local folder=$OUT/${1//:/_}-$2 again=()
    if [ -e "$folder/lora/pytorch_lora_weights.safetensors" ]; then return; fi
    if [ -e "$folder/config.yaml" ]; then again=(--ckpt_path last); fi
    mkdir -p "$folder"
    PYTHONPATH=examples/reward_mixing lightning-fdfo fit \
        --config configs/quickstart.yaml --config examples/reward_mixing/study.yaml \
        --model.rewards.OCR.weight "$ocr" --model.rewards.small.weight "$small" --model.rewards.red.weight "$red" \
        --seed_everything "$2" --trainer.default_root_dir "$folder" --trainer.enable_progress_bar false \
        ${again[@]+"${again[@]}"} "${@:3}" >>"$folder/log.txt" 2>&1
    echo "$folder"
}
export -f train

for seed in $SEEDS; do
    for mixture in $MIXTURES; do echo "$mixture $seed"; done
done | xargs -P "$JOBS" -L 1 bash -c 'train "${@: -2}" "${@:1:$#-2}"' _ "$@"
