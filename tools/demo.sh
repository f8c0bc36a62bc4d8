#!/usr/bin/env bash
# The README's flow, small enough for two CPU cores: the same scripts, with the configs in configs/demo/ and
# BCT_methods/*/configs/demo/.
#
#   tools/demo.sh [SEED [METHOD ...]]      METHOD: MixBCT (the default), UniBCT, weakenedL2, ..., independent
#
# Everything lands in demo/seed<SEED>/. A step whose result is there already is not run again.
set -euo pipefail
cd "$(dirname "$0")/.."
seed=${1:-0}
shift || true
[ $# -gt 0 ] || set -- MixBCT
root=demo/seed$seed
data=$root/dataset
report=$root/report
[ "$*" = MixBCT ] || report=$root/comparison
features=$root/feature_save/OPclass
old=f128_tiny_softmax
run=(--workspace "$root" --seed "$seed")
export OMP_WAIT_POLICY=passive          # idle threads leave the core to the workers that decode

sources() {  # digest of the code that all steps share, and of the files given
    cat ./*.py backbones/*.py configs/base.py configs/{demo,scenarios}/*.py engine/*.py losses/*.py \
        tools/demo_data/*.py tools/split_dataset/*.py tools/get_feature/*.py "$@" | cksum
}

step() {  # step RESULT COMMAND...: run the command, its output in a log, unless it has made the result before
    local result=$1 log stamp
    shift
    log=$root/log/$(basename "$(dirname "$result")")_$(basename "$result").log
    # A model.pt alone proves little: training writes one after every epoch, and code and commands change.
    stamp="$(sources ${method_files[@]+"${method_files[@]}"}) $*"
    if [ -z "$fresh" ] && [ -e "$result" ] && [ "$(cat "$log.done" 2> /dev/null)" = "$stamp" ]; then
        echo "have $result"
        return
    fi
    printf '\n[%3d s] $ %s\n' "$SECONDS" "$*"
    mkdir -p "$root/log"
    rm -f "$log.done"
    if [[ $result == */work_dirs/* ]]; then     # a run is not begun over the checkpoints of one that was cut short
        rm -rf "$(dirname "$result")"
    fi
    if ! "$@" > "$log" 2>&1; then
        tail -n 25 "$log"
        echo "that failed; the whole output is in $log" >&2
        exit 1
    fi
    echo "$stamp" > "$log.done"
    tail -n 1 "$log"
    [ ${#method_files[@]} -gt 0 ] || fresh=yes      # what follows builds on this
}

fresh=
method_files=()
step "$data/IJBC/meta/ijbc_1N_probe_mixed.csv" \
    python tools/demo_data/draw_demo_data.py --root "$data" --seed "$seed"
step "$data/ms1m-retinaface-t1/train_part_70_class.idx" \
    python tools/split_dataset/split_dataset_ms1mv3.py --root "$data/ms1m-retinaface-t1"
step "$root/work_dirs/${old}_class30/model.pt" \
    python train_old_softmax.py "configs/demo/${old}_class30.py" "${run[@]}"
step "$features/${old}_class70_feature.npy" \
    python tools/get_feature/get_feature.py "configs/demo/${old}_class30.py" --SD "${old}_class70" "${run[@]}"
step "$features/${old}_class70_avg_feature.npy" \
    python tools/get_feature/get_avg_feature.py --SD "${old}_class70" --feature_save "$root/feature_save"
step "$features/${old}_class70_credible_ratio_90_feature.npy" \
    python tools/get_feature/denoise_credible.py --T 0.9 --SD "${old}_class70" --feature_save "$root/feature_save"

models=()
for method in "$@"; do
    method_files=(configs/demo/*.py)
    if [ "$method" = independent ]; then
        name=f128_tiny_x2_arc_class70
        step "$root/work_dirs/$name/model.pt" python train_old_arc.py "configs/demo/$name.py" "${run[@]}"
        models+=(--independent "independent=$root/work_dirs/$name/model.pt:tiny_x2")
        continue
    fi
    name=OPclass_tiny_to_tiny_x2_${method}_softmax_to_arc_f128
    config=$(ls BCT_methods/*/configs/demo/"$name.py")      # weakenedL2 is a config of L2, say
    folder=${config%%/configs/*}
    method_files=("$folder"/*.py "$folder/configs/base.py" "$config")
    step "$root/work_dirs/$name/model.pt" python "$folder/train.py" "$config" "${run[@]}"
    models+=(--new "$method=$root/work_dirs/$name/model.pt:tiny_x2")
done

printf '\n[%3d s] $ %s\n' "$SECONDS" "python tools/ijbc_eval/compat_report.py --out $report ..."
python tools/ijbc_eval/compat_report.py --old "$root/work_dirs/${old}_class30/model.pt" --old_net tiny "${models[@]}" \
    -d "$data" --fpr 1e-3 --fpir 1e-1 --cache-dir "$root/cache" --out "$report"
printf '[%3d s] done\n' "$SECONDS"
