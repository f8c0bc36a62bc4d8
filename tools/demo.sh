#!/usr/bin/env bash
# The README's flow, small enough for two CPU cores: the same scripts, with the configs in configs/demo/ and
# BCT_methods/*/configs/demo/.
#
#   tools/demo.sh [SEED [METHOD ...]]      METHOD: MixBCT (the default), UniBCT, weakenedL2, ..., independent
#
# WIDTH=256 in the environment trains new models of 256 dimensions against the old one's 128, beside those of 128.
# Everything is written to demo/seed<SEED>/. Finished steps are skipped; an interrupted training run is resumed from
# its last checkpoint.
set -euo pipefail
cd "$(dirname "$0")/.."
seed=${1:-0}
shift || true
[ $# -gt 0 ] || set -- MixBCT
root=demo/seed$seed
data=$root/dataset
width=${WIDTH:-128}                      # of the new models; the old one has 128
beside=                                 # at the end of the names of what another width makes
[ "$width" = 128 ] || beside=_f$width
report=$root/report$beside
[ "$*" = MixBCT ] || report=$root/comparison$beside
features=$root/feature_save/OPclass
old=f128_tiny_softmax
run=(--workspace "$root" --seed "$seed")
export OMP_WAIT_POLICY=passive          # idle threads yield the core to the decoding workers

configs=()      # of the methods, in order, checked up front so that a typo shows before hours of training
for method in "$@"; do
    config=configs/demo/f128_tiny_x2_arc_class70.py
    if [ "$method" != independent ]; then   # a config may lie in another method's folder: weakenedL2 in L2
        config=$(echo BCT_methods/*/configs/demo/"OPclass_tiny_to_tiny_x2_${method}_softmax_to_arc_f128.py")
    fi
    if [ ! -e "$config" ]; then
        echo "$config: no such config; METHOD is one of those in BCT_methods/*/configs/demo/, or independent" >&2
        exit 1
    fi
    configs+=("$config")
done

sources() {  # digest of the code that all steps share, and of the files given
    {
        find . \( -name '.?*' -o -name venv -o -path ./dataset -o -path ./demo -o -path ./tests -o -path ./benchmarks \
            -o -path ./BCT_methods -o -path ./tools/ijbc_eval \) -prune -o -name '*.py' -type f -print0 |
            LC_ALL=C sort -z | xargs -0 cat
        [ $# = 0 ] || cat "$@"
    } | cksum
}

before=         # digest of the previous step's stamp
method_files=()
step() {        # step RESULT COMMAND...: run the command, logging its output, unless it has already made the result
    local result=$1 log stamp found
    shift
    log=$root/log/$(basename "$(dirname "$result")")_$(basename "$result").log
    # A model.pt alone proves nothing: training writes one after every epoch, and code and commands change.
    stamp="$(sources ${method_files[@]+"${method_files[@]}"}) after $before: ${BCT_OVERRIDES:-} $*"
    found=$(head -n 1 "$log.stamp" 2> /dev/null || true)
    if [ -e "$result" ] && [ "$found" = "done $stamp" ]; then
        echo "have $result"
    else
        printf '\n[%3d s] $ %s\n' "$SECONDS" "$*"
        if [[ $result == */work_dirs/* ]]; then
            if [ "$found" = "begun $stamp" ]; then
                set -- "$@" --resume True
            else        # never start over another run's checkpoints
                rm -rf "$(dirname "$result")"
            fi
        fi
        mkdir -p "$root/log"
        echo "begun $stamp" > "$log.stamp"
        # On SIGTERM training writes a checkpoint and exits with 0, though it is not finished.
        if ! "$@" > "$log" 2>&1 || grep 'stopped by SIG' "$log"; then
            tail -n 25 "$log"
            echo "not finished; see $log for the whole output; run the same command to continue" >&2
            exit 1
        fi
        printf 'done %s\n%s\n' "$stamp" "$(date) $RANDOM$RANDOM" > "$log.stamp"    # unique: the following steps run again
        tail -n 1 "$log"
    fi
    before=$(cksum < "$log.stamp")
}

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
shared=$before
for config in "${configs[@]}"; do
    method=$1
    shift
    before=$shared
    name=$(basename "$config" .py)
    name=${name/f128/f$width}
    folder=${config%%/configs/*}
    train=("$config" "${run[@]}")
    [ "$width" = 128 ] || train+=(--embedding_size "$width" --output "work_dirs/$name")
    if [ "$method" = independent ]; then
        method_files=()
        step "$root/work_dirs/$name/model.pt" python train_old_arc.py "${train[@]}"
        models+=(--independent "independent=$root/work_dirs/$name/model.pt:tiny_x2")
        step "$features/${name}_feature.npy" \
            python tools/get_feature/get_feature.py "$config" --SD "$name" "${train[@]:1}"
        for kind in procrustes ridge; do        # its maps into the old model's space, learned afterwards
            map=$features/$kind$beside.npz
            step "$map" python tools/adapters/fit_adapter.py --kind "$kind" \
                --new "$features/${name}_feature.npy" --old "$features/${old}_class70_feature.npy" \
                --out "$map"
            models+=(--adapter "$kind=$map@independent")
        done
    else
        method_files=("$folder"/*.py "$folder/configs/base.py" "$config")
        step "$root/work_dirs/$name/model.pt" python "$folder/train.py" "${train[@]}"
        models+=(--new "$method=$root/work_dirs/$name/model.pt:tiny_x2")
    fi
done

printf '\n[%3d s] $ %s\n' "$SECONDS" "python tools/ijbc_eval/compat_report.py --out $report ..."
python tools/ijbc_eval/compat_report.py --old "$root/work_dirs/${old}_class30/model.pt" --old_net tiny "${models[@]}" \
    -d "$data" --fpr 1e-3 --fpir 1e-1 --cache-dir "$root/cache" --out "$report" --flips "$report/flips.csv"
printf '[%3d s] done\n' "$SECONDS"
