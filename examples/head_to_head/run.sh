#!/usr/bin/env bash
# Trains each method with each seed, from the repository's root: examples/head_to_head/run.sh [OPTIONS OF FIT]
# A method is a file of this folder, and may have a learning rate of its own: METHODS="awm@3e-4 awm@1e-3".
# A run that is complete is passed over, and one that was stopped goes on. JOBS runs go side by side.
set -euo pipefail

export OUT=${OUT:-runs/head_to_head}
METHODS=${METHODS:-fdfo fdfo_plus awm nft flow_grpo}
SEEDS=${SEEDS:-0 1 2 3 4}
JOBS=${JOBS:-1}

train() {
    set -e
    IFS=@ read -r method rate <<<"$1"
    local folder=$OUT/$1-$2 again=() lr=()
    if [ -e "$folder/complete" ]; then return; fi
    if [ -e "$folder/config.yaml" ]; then again=(--ckpt_path last); fi
    if [ -n "$rate" ]; then lr=(--model.optimizer.init_args.lr "$rate"); fi
    mkdir -p "$folder"
    local files=(--config configs/quickstart.yaml --config examples/head_to_head/study.yaml
        --config "examples/head_to_head/$method.yaml" --seed_everything "$2" --trainer.default_root_dir "$folder"
        --trainer.enable_progress_bar false)
    export PYTHONPATH=examples/head_to_head${PYTHONPATH:+:$PYTHONPATH}
    if [ ! -e "$folder/lora/pytorch_lora_weights.safetensors" ]; then
        lightning-fdfo fit "${files[@]}" ${lr[@]+"${lr[@]}"} ${again[@]+"${again[@]}"} "${@:3}" >>"$folder/log.txt" 2>&1
    fi
    lightning-fdfo predict "${files[@]}" --ckpt_path "$folder/lora" "${@:3}" >>"$folder/log.txt" 2>&1
    touch "$folder/complete"
    echo "$folder"
}
export -f train

for seed in $SEEDS; do
    for method in $METHODS; do echo "$method $seed"; done
done | xargs -P "$JOBS" -L 1 bash -c 'train "${@: -2}" "${@:1:$#-2}"' _ "$@"
