set -u
stage() { echo "=== $1 at $SECONDS s"; }
pack() { (cd $OUT/r 2>/dev/null && tar czf $OUT/all.tgz .); }
mkdir -p $OUT/r
nvidia-smi --query-gpu=name,driver_version --format=csv,noheader > $OUT/r/gpu.txt
python3 -c "import torch,triton,transformers,pydantic;print(torch.__version__,triton.__version__,transformers.__version__,pydantic.__version__)" >> $OUT/r/gpu.txt
B="python3 -m dcache bench"
stage train
(timeout 125 python3 -m dcache.models.tiny.train_v --out runs/x --seconds 90 --every 30 --problems 128 > $OUT/r/train-smoke.txt 2>&1) &
T=$!
stage tests
timeout 240 python3 -m pytest -q -p no:benchmark -p no:cacheprovider -m gpu tests -n 8 > $OUT/r/gpu-tests.txt 2>&1
tail -15 $OUT/r/gpu-tests.txt
wait $T
tail -12 $OUT/r/train-smoke.txt
pack
P="none,elastic(gamma=0),elastic,dkv,fast-dllm,d2"
stage main
timeout 170 $B e2e llada-8b:random --policies "$P" --seconds 8 --split --trace --out $OUT/r/main; pack
stage compare
timeout 60 python3 -m dcache compare --model tiny-llada --policies elastic,dkv,d2,fast-dllm --device cuda > $OUT/r/compare.txt 2>&1; tail -15 $OUT/r/compare.txt
stage dream
timeout 100 $B e2e dream-7b:random --policies "$P" --seconds 4 --split --out $OUT/r/dream | tail -20; pack
stage batch
timeout 130 $B e2e llada-8b:random --policies "none,dkv,fast-dllm,d2,elastic" --batch 8,32 --seconds 4 --out $OUT/r/batch | tail -20; pack
stage three
timeout 100 $B e2e llada-8b:random --policies "$P" --tokens-per-step 3 --seconds 4 --out $OUT/r/three | tail -20; pack
stage end
