#!/usr/bin/env bash
# Runs a training job again and again until it is complete, by hand or in SLURM.
#
# Nodes fail, time limits expire, and exit code 0 may mean "saved, to be continued": only a file,
# the finished flag, says that training is complete.
#
#   ./autoresume.sh [--max-failures N] [--flag FILE] [--slurm MODE] [--sbatch OPTIONS] COMMAND...
#   ./autoresume.sh python ft_launcher.py --nproc-per-node=4 --max-restarts=3 train.py
#
# Files (FLAG is --flag, or $FAULT_TOL_FINISHED_FLAG_FILE, which COMMAND gets, or
# ft_finished.flag, in a job array ft_finished_TASK.flag)
#   FLAG           training is complete; nothing is run while it exists
#   FLAG.progress  the newest checkpoint; another "step" is progress
#   FLAG.stop      asks the job to save a checkpoint and exit; removed after the run
#   FLAG.gave_up   the launcher's reason why another run would be pointless
#   FLAG.runs      how each run started and ended, one JSON object a line
#   FLAG.lock      locked during a run, so that there is never a second one
#   FLAG.job       the job script, for the next job of a chain
#
# What follows a run
#   FLAG exists                           exit 0
#   FLAG.gave_up exists, or exit code 93  exit 93
#   TERM, INT or HUP arrived              exit 128+N, once COMMAND, which got it too, has ended
#   exit code 2 of the first run          exit 2: wrong usage
#   the Nth failure in a row (3)          exit with COMMAND's code, or 1 where that is 0
#   USR1 arrived                          exit 0; in SLURM, the next job continues
#   anything else                         the next run; in SLURM, after exit code 0, the next job
# A run without progress is a failure, unless it exited with 0 after a minute or more and there is
# no FLAG.progress at all.
#
# USR1 creates FLAG.stop. COMMAND gets USR1 and USR2 too, and starts with both ignored.
#
# In SLURM (end the job script with "exec ./autoresume.sh ...", so that signals arrive here)
#   --slurm chain    queues the job script to run again after this job, however it ends; cancels
#                    that when training is complete or given up, and after scancel
#   --slurm requeue  requeues this job after a run that exited with 0
#   --slurm loop     does all runs in this job
#   --slurm auto     chain in a batch job that has sbatch, otherwise loop (the default)
# The next job gets the script's #SBATCH lines and arguments, and the options in --sbatch; a
# warning says what else this job was given. #SBATCH --signal=B:USR1@300 saves in time.

set -uo pipefail
shopt -s lastpipe # for "command | read": bash 5.2 may lose a signal while it parses a $(...)
exec 3>&2

say() { printf '[autoresume] %s\n' "$*" >&3; }
usage_error() { say "error: $*" && exit 2; }

parse_arguments() {
  max_failures=3 mode=auto sbatch_options=()
  flag=ft_finished${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}.flag
  flag=${FAULT_TOL_FINISHED_FLAG_FILE:-$flag}
  while [[ ${1:-} == -* ]]; do
    [[ $1 != --*=* ]] || set -- "${1%%=*}" "${1#*=}" "${@:2}"
    case $1 in
      --max-failures) max_failures=${2:-} ;;
      --flag) flag=${2:-} ;;
      --slurm) mode=${2:-} ;;
      --sbatch) eval "sbatch_options+=(${2:-})" || usage_error "--sbatch: cannot split '$2'" ;;
      -h | --help) sed -n '2,/^$/s/^# \{0,1\}//p' "$0" && exit 0 ;;
      --) shift && break ;;
      *) usage_error "unknown option $1: see --help, or put -- before the command" ;;
    esac
    shift $(($# > 1 ? 2 : 1))
  done
  command=("$@")
}

check_arguments() {
  [[ $max_failures =~ ^[1-9][0-9]*$ ]] ||
    usage_error "--max-failures: got '$max_failures', expected a number of at least 1"
  [[ $mode =~ ^(chain|requeue|loop|auto)$ ]] ||
    usage_error "--slurm: got '$mode', expected chain, requeue, loop or auto"
  type -P -- "${command[0]:-}" >/dev/null || usage_error "command '${command[0]:-}' not found"
  [[ $flag == /* ]] || flag=$PWD/$flag
  # Root may write where nobody can: only trying shows it.
  if [[ -d $flag ]] || ! { : >>"$flag.lock"; } 2>/dev/null; then
    usage_error "--flag: got '$flag', expected a file in a writable directory"
  fi
}

# Set a variable to a member of the JSON object on a file's last line: text without its quotes.
read_member() { # VARIABLE FILE NAME
  local line='' pattern="\"$3\": *(\"(([^\"\\\\]|\\\\.)*)\"|([^\",}]*))"
  tail -n 1 -- "$2" 2>/dev/null | IFS= read -r line
  [[ $line =~ $pattern ]]
  printf -v "$1" %s "${BASH_REMATCH[2]:-${BASH_REMATCH[4]:-}}"
}

# Add a line to FLAG.runs.
note() { # RESULT REASON
  local unfit='[\"\\[:cntrl:]]' # for JSON
  printf '{"time":"%(%FT%T%z)T","job":"%s","run":%d,"step":"%s","failures":%d,' \
    -1 "$job" "$run" "${step//$unfit/}" "$failures" >>"$flag.runs"
  printf '"continuation":"%s","result":"%s","reason":"%s"}\n' \
    "$continuation" "$1" "${2//$unfit/}" >>"$flag.runs"
}

# COMMAND inherits the lock, so that it holds as long as either of us lives. At our end it is
# released, whatever COMMAND has left running.
take_lock() {
  local waited=0
  exec 9>>"$flag.lock"
  until flock --nonblock --conflict-exit-code 75 9; do
    (($? == 75)) || return
    [[ -z $stopped_by$handing_over ]] || exit "$stop_code"
    ((waited++)) || say_who_holds_the_lock
    # A job of a chain waits as long as it takes: the holder may have outlived its slurmd.
    if ((waited > 60)) && [[ -z $continues ]]; then
      cancel_continuation
      say "error: another run still holds $flag.lock"
      exit 1
    fi
    sleep 1
  done
  trap 'flock --unlock 9' EXIT
}

say_who_holds_the_lock() {
  local process words holders=''
  for process in /proc/[0-9]*; do
    if [[ $process/fd/9 -ef $flag.lock ]] && grep -qs ^lock: "$process/fdinfo/9"; then
      mapfile -d '' -t words <"$process/cmdline"
      holders+=" pid ${process#/proc/} (${words[*]:0:5})"
    fi
  done
  say "waiting for another run, which holds $flag.lock:${holders:- on another host}"
}

# -- SLURM

# Set `info` to what SLURM shows of a job.
show() { # JOB
  scontrol show job "$1" 2>/dev/null | IFS= read -r -d '' info
  [[ -n $info ]]
}

know_job() {
  id=${SLURM_ARRAY_JOB_ID:-${SLURM_JOB_ID:-}}
  job=$id${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}
  [[ -n $job ]] || mode=loop
  if [[ -n $job ]] && grep -qz '/slurm_script$' "/proc/$PPID/cmdline"; then
    say "warning: signals will not arrive here: end the job script with exec ./autoresume.sh ..."
  fi
  if [[ $mode == auto ]]; then
    show "$job"
    mode=chain
    [[ $info != *BatchFlag=0* ]] && type -P sbatch >/dev/null || mode=loop
  fi
}

# Learn from FLAG.runs what the job before did: this one itself, if it was requeued.
recall() {
  local earlier next noted
  read_member step "$flag.progress" step
  read_member earlier "$flag.runs" job
  read_member next "$flag.runs" continuation
  if [[ $mode == loop || $earlier != "$job" && $next != "$id" ]]; then
    rm -f -- "$flag.gave_up" # whoever starts a job wants to try again
    return
  fi
  continues=$earlier
  read_member run "$flag.runs" run
  read_member failures "$flag.runs" failures
  read_member noted "$flag.runs" step
  [[ $step == "$noted" ]] || failures=0
  if show "$continues" && [[ $info == *JobState=CANCELLED* ]]; then
    end 0 cancelled "job $continues, which this job was to continue, was cancelled"
  fi
}

# Have a job that waits for the end of this one. If the user cancels it, there is no other.
keep_continuation() {
  [[ $mode == chain ]] && find_continuation || return
  [[ -n $queued$continuation ]] || queue_continuation
  [[ -z $continuation ]] || queued=yes
}

# There may be one of before a requeue, or of an sbatch that failed after it had reached SLURM.
find_continuation() {
  local id dependency script found=''
  squeue --me --noheader --states PENDING --format '%A %E %o' |
    while read -r id dependency script; do
      [[ "$dependency(" != "afterany:$job("* || "$script " != "$flag.job "* ]] || found=$id
    done || return
  continuation=$found
}

queue_continuation() {
  local directory shown arguments name
  show "$job" && scontrol write batch_script "$job" "$flag.job" >/dev/null || return
  directory=${info#*$'\n   WorkDir='}
  shown=${info#*$'\n   Command='}
  find_arguments "${shown%%$'\n'*}"
  {
    for name in "${!SLURM_@}"; do # what describes this job would confuse srun in the next
      [[ $name == SLURM_CONF ]] || declare -g +x "$name"
    done
    cd -- "$SLURM_SUBMIT_DIR" &&
      sbatch --parsable --dependency="afterany:$job" --job-name="$SLURM_JOB_NAME" \
        ${SLURM_ARRAY_TASK_ID:+--array="$SLURM_ARRAY_TASK_ID"} --open-mode=append \
        --chdir="${directory%%$'\n'*}" "${sbatch_options[@]}" "$flag.job" "${arguments[@]}"
  } | IFS=';' read -r continuation name
  if [[ -n $continuation ]]; then
    say "job $continuation is queued to continue when this job ends"
    warn_of_differences
  else
    say "no continuation is queued: doing all runs in this job until there is one"
  fi
}

# SLURM shows a script's path and arguments as one text. Where our own arguments end like it, as
# with "$@", they tell where each begins; otherwise each word is one.
find_arguments() { # TEXT
  local path=$1 text i
  until [[ -f $path || $path != *' '* ]]; do path=${path% *}; done
  text=${1:${#path}}
  read -r -a arguments <<<"$text"
  for ((i = 0; i < ${#our_arguments[@]}; i++)); do
    [[ " ${our_arguments[*]:i}" != "$text" ]] || arguments=("${our_arguments[@]:i}")
  done
}

warn_of_differences() {
  local ours=$info pair here there differences=''
  # What to compare: SLURM's name and sbatch's.
  local compared='TimeLimit:time Partition:partition Account:account QOS:qos NumNodes:nodes
    Reservation:reservation NumTasks:ntasks CPUs/Task:cpus-per-task Requeue:requeue
    MinMemoryNode:mem MinMemoryCPU:mem-per-cpu TresPerJob:gpus TresPerNode:gpus-per-node
    TresPerTask:gpus-per-task Features:constraint OverSubscribe:exclusive
    ReqNodeList:nodelist ExcNodeList:exclude'
  show "$continuation" || return
  for pair in $compared; do
    [[ $ours =~ \ ${pair%:*}=([^[:space:]]*) ]]
    here=${BASH_REMATCH[1]:-none}
    [[ $info =~ \ ${pair%:*}=([^[:space:]]*) ]]
    there=${BASH_REMATCH[1]:-none}
    # A job that waits may show several partitions, or a range of nodes.
    [[ ",$there," == *,"$here"[,-]* ]] ||
      differences+=", --${pair##*:} ($here here, $there there)"
  done
  [[ -z $differences ]] || say "warning: job $continuation differs in${differences#,}:" \
    "write #SBATCH lines, or --sbatch 'OPTIONS'"
}

cancel_continuation() {
  [[ $mode != chain || -n $continuation ]] || find_continuation
  [[ -z $continuation ]] || scancel "$continuation"
  continuation='' mode=loop
}

deliver() { # SIGNAL
  [[ $1 != USR1 ]] || : >"$flag.stop"
  kill -s "$1" -- "-$child"
  kill -s CONT -- "-$child" # a stopped process hears nothing else
}

pass_on() { # SIGNAL
  say "got SIG$1: passing it on"
  noted+=" $1"
  [[ -z $child ]] || deliver "$1" # otherwise as soon as there is one
}

stop() { # SIGNAL EXIT_CODE
  stopped_by=SIG$1 stop_code=$2
  pass_on "$1"
  # SLURM sends TERM for other reasons too, but those leave a reason, a time or a count.
  if [[ $mode == chain ]] && show "$job" &&
    [[ $info == *JobState=C*" Reason=None "*" Restarts=${SLURM_RESTART_COUNT:-0} "* ]] &&
    [[ $info != *PreemptTime=[0-9]* ]]; then
    say "the job was cancelled: cancelling its continuation $continuation"
    cancel_continuation
  fi
}

# -- the loop

# Run the command to its end; its exit code goes to `status`.
run_command() {
  local pid signal early
  set -m # gives it a process group of its own
  (trap '' USR1 USR2 && exec "${command[@]}" 2>&3 3>&-) & # without a handler, they end nothing
  pid=$!
  set +m
  # Until exec, it is a copy of this shell and would swallow a signal; without a #! line, for ever.
  while ((SECONDS < 2)) && cmp -s "/proc/$$/cmdline" "/proc/$pid/cmdline"; do :; done
  early=$noted child=$pid # in one command: no trap runs in between
  for signal in $early; do deliver "$signal"; done
  # Not "wait" alone: when two signals interrupt it at the same time, bash 5.2 may lose one.
  while kill -0 "$pid"; do sleep 0.2; done
  wait "$pid"
  status=$?
  child=''
}

run_once() {
  local before=$step
  run=$((run + 1)) failures=$((failures + 1)) # a failure, until it shows progress
  say "run $run starts"
  note running ''
  SECONDS=0
  run_command 2>/dev/null # where bash says "Killed"
  say "run $run ended with exit code $status after $SECONDS s"
  read_member step "$flag.progress" step
  if [[ $step != "$before" ]]; then
    failures=0
    say "a checkpoint of step $step was saved"
  elif [[ $status == 0 && ! -e $flag.progress ]] && ((SECONDS >= 60)); then
    failures=0
  elif [[ ! -e $flag ]]; then
    say "no new checkpoint was reported, $failures of $max_failures in a row"
  fi
}

end() { # EXIT_CODE RESULT REASON
  [[ $2 == stopped || $2 == unfinished ]] || cancel_continuation
  note "$2" "$3"
  say "$3"
  exit "$1"
}

end_if_over() {
  local reason
  if [[ -e $flag ]]; then
    read_member reason "$flag" reason
    end 0 complete "training is complete: $flag${reason:+ ($reason)}; to train on, remove it"
  elif [[ $status == 93 || -e $flag.gave_up ]]; then
    read_member reason "$flag.gave_up" reason
    end 93 "gave up" "gave up: ${reason:-the command exited with 93}"
  elif [[ -n $stopped_by ]]; then
    end "$stop_code" stopped "stopped by $stopped_by${continuation:+: job $continuation continues}"
  elif ((status == 2 && run == 1 && failures)); then
    end 2 failed "wrong usage of the command"
  elif ((failures >= max_failures)); then
    end $((status ? status : 1)) failed "$failures runs in a row without progress: giving up"
  fi
}

# Leave the next run to the next job.
hand_over() {
  [[ -z $continuation ]] || end 0 unfinished "job $continuation continues from here"
  if [[ $mode == requeue ]]; then
    note unfinished "requeueing job $job"
    scontrol requeue "$job" || [[ -n $stopped_by ]] && exit 0 # SLURM sends TERM at once
    say "cannot requeue job $job: doing all runs in this job"
    mode=loop
  fi
  [[ -z $handing_over ]] || end 0 unfinished "stopped as asked: run this again to continue"
}

main() {
  our_arguments=("$@")
  parse_arguments "$@"
  check_arguments
  child='' noted='' stopped_by='' stop_code=0 handing_over='' status='' run=0 failures=0
  continues='' continuation='' queued='' step=''
  know_job
  recall
  end_if_over
  trap 'stop TERM 143' TERM
  trap 'stop INT 130' INT
  trap 'stop HUP 129' HUP
  trap 'handing_over=yes && pass_on USR1' USR1
  trap 'pass_on USR2' USR2
  keep_continuation
  take_lock
  export FAULT_TOL_FINISHED_FLAG_FILE=$flag
  [[ ! -t 0 ]] || exec </dev/null # in the background, a read from the terminal would hang COMMAND
  while true; do
    rm -f -- "$flag.stop" # meant for an earlier run
    noted=''
    end_if_over
    keep_continuation
    [[ $status != 0 && -z $handing_over ]] || hand_over
    [[ -z $status ]] || note unfinished "exit code $status"
    run_once
  done
}

main "$@"
