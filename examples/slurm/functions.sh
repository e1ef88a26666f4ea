# shellcheck shell=bash
# What the sbatch scripts of this folder share; they source it. docs/slurm.md explains the variables.

: "${GPUS_PER_NODE:=8}"
: "${RUN_DIR:=runs/slurm}"
: "${PYTHON:=python}"
: "${CONTAINER:=}"
: "${MOUNTS:=$REPO:$REPO}"
: "${DRY_RUN:=0}"
: "${SAVE_MARGIN_SECONDS:=1200}"
: "${SERVER_START_SECONDS:=1800}"
: "${MAX_RESTARTS:=50}"

# The words that nemo_mapo.launch writes to run.json when a run ended before its last step.
ENDED_EARLY='ended before its last step'

# This checkout, and not one that the container has.
export PYTHONPATH="$REPO${PYTHONPATH:+:$PYTHONPATH}"

# A command substitution that fails ends the script too.
shopt -s inherit_errexit

signals=0

fail() {
  echo "error: $*" >&2
  exit 2
}

dry_run() {
  [[ $DRY_RUN != 0 ]]
}

# Host names of a node list, one a line; a dry run outside of a job has names that say what they stand for.
hosts() { # hosts NODE_LIST PLACEHOLDER COUNT
  if [[ -n $1 ]]; then
    scontrol show hostnames "$1"
  elif dry_run; then
    local number
    for ((number = 1; number <= $3; number++)); do echo "$2$number"; done
  else
    fail "no node list of the $2 nodes; submit this script with sbatch, or set DRY_RUN=1"
  fi
}

# Seconds until the time limit of the job, from squeue's [DAYS-][HOURS:]MINUTES:SECONDS.
seconds_left() {
  local left days=0 seconds=0 part
  left=$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%L | head -n 1 | tr -d ' ')
  [[ $left =~ ^([0-9]+-)?[0-9:]+$ ]] || fail "squeue tells no time limit ('$left'); submit with --time"
  if [[ $left == *-* ]]; then
    days=${left%%-*}
    left=${left#*-}
  fi
  for part in ${left//:/ }; do seconds=$((seconds * 60 + 10#$part)); done
  echo $((10#$days * 86400 + seconds))
}

# trainer.mapo.max_time_per_run (DD:HH:MM:SS): the time left, less what starting up, a last step and a checkpoint take.
max_time_per_run() {
  local seconds
  if dry_run && [[ -z ${SLURM_JOB_ID:-} ]]; then
    seconds=$((4 * 3600))
  else
    seconds=$(seconds_left)
  fi
  seconds=$((seconds - SAVE_MARGIN_SECONDS))
  ((seconds > 0)) || fail "less than SAVE_MARGIN_SECONDS=$SAVE_MARGIN_SECONDS are left; submit with a longer --time"
  printf '%02d:%02d:%02d:%02d' $((seconds / 86400)) $((seconds / 3600 % 24)) $((seconds / 60 % 60)) $((seconds % 60))
}

# Start a job step in the background and leave its process in $started; a dry run only prints the line.
start() { # start SRUN_OPTIONS_AND_COMMAND...
  local container=()
  if [[ -n $CONTAINER ]]; then
    container=(--container-image="$CONTAINER" --container-mounts="$MOUNTS" --container-workdir="$REPO"
      --no-container-mount-home)
  fi
  local line=(srun --kill-on-bad-exit=1 "${container[@]}" "$@")
  printf '+'
  printf ' %q' "${line[@]}"
  printf '\n'
  started=
  if ! dry_run; then
    "${line[@]}" &
    started=$!
  fi
}

# In a dry run, the whole config of a command as Hydra composes it.
print_config() { # print_config SCRIPT OVERRIDES...
  if dry_run; then
    echo "# resolved config of $1"
    "$PYTHON" "$@" --cfg job --resolve
  fi
}

# Wait until a server accepts connections, or fail when its step ends or it takes too long.
wait_for_port() { # wait_for_port NAME HOST PORT PROCESS
  if dry_run; then return; fi
  local deadline=$((SECONDS + SERVER_START_SECONDS))
  until (exec 3<>"/dev/tcp/$2/$3") 2>/dev/null; do
    kill -0 "$4" 2>/dev/null || fail "the $1 ended before it accepted connections; its output says why"
    ((SECONDS < deadline)) || fail "the $1 accepted no connection on $2:$3 within $SERVER_START_SECONDS s"
    sleep 1
  done
}

newest_checkpoint() {
  [[ -d $RUN_DIR/checkpoints ]] || return 0
  find "$RUN_DIR/checkpoints" -maxdepth 1 -name 'step_*' ! -name '*.unfinished' | sort | tail -n 1
}

# The time limit is near (USR1, see --signal) or the job is preempted (TERM): ask the trainer to save and end. srun
# hands USR1 on to its tasks (on TERM it would kill them), and rank.sh makes it the TERM that the trainer understands.
ask_trainer_to_save() {
  signals=$((signals + 1))
  echo "signal $1: asking the trainer to save and end"
  kill -USR1 "$trainer" 2>/dev/null || true
}

# Exit status of a background process; a trapped signal interrupts `wait`, not this.
status_of() { # status_of PROCESS
  local before
  while :; do
    before=$signals
    status=0
    wait "$1" || status=$?
    ((signals == before)) && return
  done
}

# Train until the end of the run or of the job's time; requeue the job if there is more to train.
train() { # train HOSTS SRUN_OPTIONS... -- OVERRIDES...
  local options=() nodes time_limit before hosts=$1
  shift
  while [[ $1 != -- ]]; do
    options+=("$1")
    shift
  done
  shift
  nodes=$(wc -l <<<"$hosts")
  time_limit=$(max_time_per_run)
  export MASTER_ADDR WORLD_SIZE=$((nodes * GPUS_PER_NODE)) MASTER_PORT=$((20000 + ${SLURM_JOB_ID:-0} % 20000))
  MASTER_ADDR=$(head -n 1 <<<"$hosts")
  local overrides=(
    trainer.accelerator=gpu
    trainer.num_nodes="$nodes"
    trainer.devices="$GPUS_PER_NODE"
    trainer.mapo.max_time_per_run="$time_limit"
    exp_manager.explicit_log_dir="$RUN_DIR"
    exp_manager.resume_if_exists=true
    "$@"
  )
  before=$(newest_checkpoint)
  start "${options[@]}" --nodes="$nodes" --ntasks-per-node="$GPUS_PER_NODE" --gpus-per-node="$GPUS_PER_NODE" \
    bash examples/slurm/rank.sh "$PYTHON" examples/train_mapo.py "${overrides[@]}"
  if dry_run; then
    print_config examples/train_mapo.py "${overrides[@]}"
    exit
  fi
  trainer=$started
  trap 'ask_trainer_to_save USR1' USR1
  trap 'ask_trainer_to_save TERM' TERM
  status_of "$trainer"
  trap - USR1 TERM
  ((status == 0)) || { echo "error: the trainer ended with status $status" >&2; exit "$status"; }
  if grep -qs "$ENDED_EARLY" "$RUN_DIR/run.json"; then requeue "$before"; fi
}

# Put the job back into the queue, unless it makes no progress.
requeue() { # requeue NEWEST_CHECKPOINT_BEFORE
  [[ $(newest_checkpoint) != "$1" ]] ||
    fail "the run was cut short without a new checkpoint; submit with a longer --time, or lower SAVE_MARGIN_SECONDS"
  ((${SLURM_RESTART_COUNT:-0} < MAX_RESTARTS)) || fail "restarted MAX_RESTARTS=$MAX_RESTARTS times; submit it again"
  echo "the run goes on after a restart: requeueing job $SLURM_JOB_ID"
  scontrol requeue "$SLURM_JOB_ID"
}
