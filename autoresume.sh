#!/usr/bin/env bash
# autoresume.sh: runs a training job again and again until it is complete, by hand or inside of sbatch.
#
#   ./autoresume.sh [--max-failures N] [--flag FILE] [--slurm MODE] [--] COMMAND...
#   ./autoresume.sh python ft_launcher.py --nproc-per-node=4 --max-restarts=3 train.py
#
# Files (FLAG is --flag, else $FAULT_TOL_FINISHED_FLAG_FILE, else ./ft_finished.flag; exported to COMMAND; in a job
# array the default is ./ft_finished_TASK.flag)
#   FLAG           made by the job when training is complete; nothing is run while it exists
#   FLAG.progress  made anew by the job for each checkpoint that is on disk
#   FLAG.stop      asks the job to save a checkpoint and to end, unfinished
#   FLAG.gave_up   made by the launcher when running again makes no sense, with the reason
#   FLAG.runs      what became of each run, one JSON object a line
#   FLAG.lock      locked while a run goes on, so that there is never a second one
#   FLAG.job       the job script, for the next job of the chain
#
# What a run is followed by
#   FLAG exists                        the end, exit code 0
#   FLAG.gave_up, or exit code 93      the end, exit code 93
#   TERM, INT or HUP had arrived       the end, exit code 128+N, after COMMAND, which got the signal too, has ended
#   exit code 2 (wrong usage)          the end, exit code 2
#   no progress, the Nth in a row      the end, with the exit code of COMMAND, or 1 where that is 0
#   USR1 had arrived                   the end, exit code 0; inside of SLURM, the next job goes on
#   anything else                      the next run; inside of SLURM, if COMMAND ended with 0, in the next job
# Progress is another step in FLAG.progress than after the run before. Exit code 2 is wrong usage, also of this script.
# USR1 asks the job to save a checkpoint and to end (FLAG.stop); USR2 is passed on to COMMAND.
#
# Inside of SLURM (let the job script end with: exec ./autoresume.sh ..., so that its signals arrive here)
#   --slurm chain    queues the same job script to start when this job has ended, for whatever reason, and cancels it
#                    when training is complete or given up, or the job is cancelled by scancel
#                    (the next job gets the options that SLURM shows; write --signal as an #SBATCH line)
#   --slurm requeue  requeues this job when a run has ended with 0 and training is not complete
#   --slurm loop     does all runs in this job
#   --slurm auto     chain, where there is sbatch (the default)
#   #SBATCH --signal=B:USR1@300 makes the job save a checkpoint and hand over 300 s before its time limit.
set -u
exec 3>&2

say() { printf '[autoresume] %s\n' "$*" >&3; }

usage_error() {
  say "error: $*"
  exit 2
}

usage() { sed -n '2,/^set -u/{/^set -u/d;s/^# \{0,1\}//;p;}' "$0"; }

# -- arguments

parse_arguments() {
  max_failures=3
  flag=${FAULT_TOL_FINISHED_FLAG_FILE:-ft_finished${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}.flag}
  mode=auto
  while (($#)); do
    case $1 in
      --max-failures | --flag | --slurm)
        (($# > 1)) || usage_error "$1 needs a value"
        set_option "$1" "$2"
        shift 2
        ;;
      --max-failures=* | --flag=* | --slurm=*) set_option "${1%%=*}" "${1#*=}" && shift ;;
      -h | --help) usage && exit 0 ;;
      --) shift && break ;;
      -*) usage_error "unknown option $1: expected --max-failures, --flag, --slurm, or -- before the command" ;;
      *) break ;;
    esac
  done
  command=("$@")
}

set_option() { # NAME VALUE
  case $1 in
    --max-failures) max_failures=$2 ;;
    --flag) flag=$2 ;;
    --slurm) mode=$2 ;;
  esac
}

check_arguments() {
  [[ $max_failures =~ ^[1-9][0-9]*$ ]] || usage_error "--max-failures: got '$max_failures', expected a number of at least 1"
  [[ $mode =~ ^(chain|requeue|loop|auto)$ ]] || usage_error "--slurm: got '$mode', expected chain, requeue, loop or auto"
  ((${#command[@]})) || usage_error "no command: give what is to be run, such as: python ft_launcher.py train.py"
  type -P -- "${command[0]}" >/dev/null || usage_error "command '${command[0]}' not found, or not executable: give its path"
  [[ -n $flag ]] || usage_error "--flag: got an empty name, expected a file"
  [[ $flag == /* ]] || flag=$PWD/$flag
  local directory
  directory=$(dirname -- "$flag")
  [[ -d $directory ]] || usage_error "the directory of the flag does not exist: create '$directory', or choose another --flag"
  # Root may write where nobody may: only trying tells, also of a file system that is mounted read-only.
  { : >>"$flag.lock"; } 2>/dev/null || usage_error "the directory of the flag is not writable: '$directory'"
  [[ ! -d $flag ]] || usage_error "the flag '$flag' is a directory: expected a file"
}

# -- files

# What is read goes to $REPLY: a $(...) in the loop, or in a trap, must be in a subshell, since bash 5.2 fails with a syntax
# error when a signal arrives while it parses one.

read_line() { # FILE
  REPLY=''
  [[ ! -r $1 ]] || { IFS= read -r REPLY <"$1"; } 2>/dev/null
}

# The value of a member of the JSON object that is the first line of a file: text without its quotes, else as it is.
read_member() { # FILE NAME
  local pattern="\"$2\": *(\"(([^\"\\\\]|\\\\.)*)\"|([^\",}]*))"
  read_line "$1"
  if [[ $REPLY =~ $pattern ]]; then REPLY=${BASH_REMATCH[2]:-${BASH_REMATCH[4]}}; else REPLY=''; fi
}

# Add a line to FLAG.runs.
note() { # EVENT RESULT REASON
  read_member "$flag.progress" step
  local unfit='[\"\\[:cntrl:]]' # for JSON
  printf '{"event": "%s", "run": %d, "job": "%s", "time": "%(%Y-%m-%dT%H:%M:%S%z)T", "step": "%s", "failures": %d, "continuation": "%s", "result": "%s", "reason": "%s"}\n' \
    "$1" "$run" "$job" -1 "${REPLY//$unfit/}" "$failures" "$continuation" "$2" "${3//$unfit/}" >>"$flag.runs"
}

# What the last line of FLAG.runs says.
read_note() { # NAME
  REPLY=''
  [[ ! -e $flag.runs ]] || read_member <(tail -n 1 -- "$flag.runs") "$1"
}

# Never two runs of one job. The lock is COMMAND's too: it holds as long as either of us lives. A job of a chain waits for
# as long as it may: what an earlier one has left running, on a node whose slurmd died, would be the end of the chain.
take_lock() {
  local conflict=75 waited=0
  exec 9>>"$flag.lock"
  while true; do
    flock --nonblock --conflict-exit-code "$conflict" 9 && return
    (($? == conflict)) || break
    ((waited)) || say "another run holds $flag.lock: waiting for it to end"
    if [[ -n $stopped_by$handing_over ]]; then
      cancel_if_cancelled
      say "asked to end before the other run has ended${continuation:+: job $continuation goes on from here}"
      exit 1
    elif ((waited >= 60)) && [[ -z $continues ]]; then
      cancel_continuation
      say "error: another run still holds $flag.lock: this one ends"
      exit 1
    fi
    sleep 1
    waited=$((waited + 1))
  done
  say "cannot lock $flag.lock: nothing keeps a second run of this job from starting"
}

# -- SLURM

# What the continuation is told as this job was: NAME:OPTION. Of the environment, SLURM sets these only if sbatch was told.
OPTIONS='SLURM_NTASKS:ntasks SLURM_NTASKS_PER_NODE:ntasks-per-node SLURM_CPUS_PER_TASK:cpus-per-task
  SLURM_MEM_PER_NODE:mem SLURM_MEM_PER_CPU:mem-per-cpu SLURM_MEM_PER_GPU:mem-per-gpu
  SLURM_GPUS:gpus SLURM_GPUS_PER_NODE:gpus-per-node SLURM_GPUS_PER_TASK:gpus-per-task
  Account:account QOS:qos Partition:partition Reservation:reservation NumNodes:nodes TimeLimit:time TresPerNode:gres
  Features:constraint Licenses:licenses ReqNodeList:nodelist ExcNodeList:exclude Nice:nice Comment:comment
  MailUser:mail-user MailType:mail-type WorkDir:chdir StdOut:output StdErr:error'

# Ask SLURM about a job, for get.
ask() { # JOB
  info=$(scontrol show job "$1" 2>/dev/null)
}

get() { # NAME
  case $1 in
    Command | WorkDir | StdOut | StdErr | Comment) sed -n "s/^ *$1=//p" <<<"$info" ;;
    *) sed -nE "/^ *Com(mand|ment)=/d; s/^(.* )?$1=([^ ]*).*/\2/p" <<<"$info" ;;
  esac
}

# Set what we know of this job: its id, how runs are to follow each other, which job it continues, and whether it
# continues that, or an earlier life of its own.
know_job() {
  job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID} # SLURM_JOB_ID may be that of the whole array
  job=${job:-${SLURM_JOB_ID:-}} earlier='' continues='' continuation=''
  if [[ -z $job ]]; then
    mode=loop
    return
  fi
  ask "$job"
  [[ "$(get Command) " != "$flag.job "* ]] || earlier=${SLURM_JOB_DEPENDENCY:-unknown}
  earlier=${earlier#afterany:} continues=$earlier${SLURM_RESTART_COUNT:-}
  if [[ $mode == auto ]]; then
    mode=chain
    [[ $(get BatchFlag) != 0 ]] || mode=loop # it has no script
    type -P sbatch >/dev/null || mode=loop
  fi
}

# Have a job that waits for the end of this one, unless the user has cancelled it.
keep_continuation() {
  [[ $mode == chain ]] || return 0
  local known=$continuation
  find_continuation || return 0
  if [[ -n $known && -z $continuation ]]; then
    say "job $known, which was to go on from here, was cancelled: doing all runs in this job"
    mode=loop
  elif [[ -z $continuation ]]; then
    queue_continuation
    [[ -n $continuation ]] || say "cannot queue a continuation: doing all runs in this job, unless it can be queued later"
  fi
  [[ -z $continuation || $continuation == "$known" ]] || say "job $continuation is queued to go on when this job ends"
}

# It is there when this job was requeued, and when sbatch failed after it had reached SLURM.
find_continuation() {
  local jobs id dependency script
  jobs=$(squeue --noheader --user "$(id -u)" --states PENDING --format '%A %E %o') || return
  continuation=''
  while read -r id dependency script; do
    [[ ! $dependency =~ ^afterany:$job(\(|$) || "$script " != "$flag.job "* ]] || continuation=$id
  done <<<"$jobs"
}

queue_continuation() {
  local options=() arguments=() cleaned=() name
  scontrol write batch_script "$job" "$flag.job" >/dev/null || return 0
  ask "$job"
  find_options
  find_arguments
  # The environment goes along, but what tells of this job would confuse srun in the next.
  for name in "${!SLURM_@}"; do
    [[ $name == SLURM_CONF ]] || cleaned+=(-u "$name")
  done
  continuation=$(cd -- "$SLURM_SUBMIT_DIR" && env "${cleaned[@]}" \
    sbatch --parsable "${options[@]}" "$flag.job" ${arguments[@]+"${arguments[@]}"})
  continuation=${continuation%%;*}
}

find_options() {
  local pair name value
  options=(--dependency="afterany:$job" --job-name="$SLURM_JOB_NAME" --open-mode=append)
  for pair in $OPTIONS; do
    name=${pair%:*}
    if [[ $name == SLURM_* ]]; then value=${!name:-}; else value=$(get "$name"); fi
    case $name in
      TresPerNode) value=${value//gres[:\/]/} && [[ -z ${SLURM_GPUS_PER_NODE:-} ]] || continue ;; # shown as these, too
      StdOut) value=$(as_pattern "$value") ;;
      StdErr) [[ $value != "$(get StdOut)" ]] || continue && value=$(as_pattern "$value") ;;
    esac
    [[ $value =~ ^(|0|\(null\)|N/A|-.*)$ ]] || options+=("--${pair#*:}=$value")
  done
  case $(get OverSubscribe) in
    NO) options+=(--exclusive) ;;
    USER) options+=(--exclusive=user) ;;
    YES) options+=(--oversubscribe) ;;
  esac
  if [[ $(get Requeue) == 0 ]]; then options+=(--no-requeue); else options+=(--requeue); fi
  [[ -z ${SLURM_ARRAY_TASK_ID:-} ]] || options+=(--array="$SLURM_ARRAY_TASK_ID")
}

# A file of this job's output with the job's id as sbatch is given it.
as_pattern() { # FILE
  [[ $1 == /* ]] || return 0
  local task=${SLURM_ARRAY_JOB_ID:-none}_${SLURM_ARRAY_TASK_ID:-}
  printf '%s/' "${1%/*}"
  sed -E "s/(^|[^0-9])$task([^0-9]|\$)/\1%A_%a\2/; s/(^|[^0-9])$SLURM_JOB_ID([^0-9]|\$)/\1%j\2/" <<<"${1##*/}"
}

# Those of the job script. SLURM shows them as one text behind its path; where our own end with the same, as they do with
# "$@" in the job script, it is known where each of them begins.
find_arguments() {
  local shown path i
  shown=$(get Command)
  for ((i = 1; i < ${#shown}; i++)); do
    [[ ${shown:i:1} != ' ' || ! -f ${shown:0:i} ]] || break
  done
  path=${shown:0:i} shown=${shown:i}
  [[ -f $path || $path != /* ]] || say "$path is not there any more: the next job gets no arguments"
  [[ -n $shown ]] || return 0
  for ((i = 0; i < ${#our_arguments[@]}; i++)); do
    arguments=("${our_arguments[@]:i}")
    [[ "${arguments[*]}" != "${shown:1}" ]] || return 0
  done
  read -r -a arguments <<<"$shown"
  say "the next job gets as arguments the words:$shown (SLURM does not show where an argument begins)"
}

cancel_continuation() {
  local known=$continuation
  [[ $mode != chain ]] || find_continuation
  continuation=${continuation:-$known}
  [[ -z $continuation ]] || scancel "$continuation"
  continuation=''
}

cancel_if_cancelled() {
  [[ $mode == chain && -n $stopped_by ]] && (is_cancelled) || return 0
  say "the job was cancelled: cancelling its continuation $continuation"
  cancel_continuation
  mode=loop
}

# scancel means that the job is not wanted any more. A time limit and preemption send TERM too, and so does a requeue,
# but these leave a reason, a time or a count.
is_cancelled() {
  ask "$job"
  [[ $(get JobState) =~ ^(COMPLETING|CANCELLED)$ && $(get Reason) == None && $(get PreemptTime) =~ ^(None)?$ &&
    $(get Restarts) == "${SLURM_RESTART_COUNT:-0}" ]]
}

# A job that is cancelled while it waits to start again, or with KILL, cannot cancel its continuation: that one has to see it.
end_if_earlier_is_cancelled() {
  ask "$earlier"
  [[ $(get JobState) == CANCELLED ]] || return 0
  say "job $earlier, which this job continues, was cancelled: nothing to run"
  exit 0
}

# -- signals

pass_on() { # SIGNAL
  if [[ $child == starting ]]; then
    early+=" $1"
  elif [[ -n $child ]]; then
    kill -s "$1" -- "-$child" 2>/dev/null
  fi
}

stop() { # SIGNAL
  signals=$((signals + 1)) stopped_by=$1
  say "got SIG$1: passing it on, waiting for the command to end, starting no other run"
  pass_on "$1"
  pass_on CONT # it may be stopped, and hear nothing else
}

user_signal() { # SIGNAL
  signals=$((signals + 1))
  if [[ $1 == USR1 ]]; then
    say "got SIGUSR1: asking the job to save a checkpoint and to end ($flag.stop)"
    handing_over=yes
    : >"$flag.stop"
  else
    pass_on "$1"
  fi
}

# -- the loop

# Run the command to its end; its exit code goes to $status.
run_once() {
  local pid signal heard
  early=$stopped_by child=starting # assignments in one command: no trap runs between them
  set -m # gives it a process group of its own, a stdin, and a SIGINT that is not ignored
  "${command[@]}" 2>&3 3>&- &
  pid=$!
  set +m
  # As long as it is a copy of this shell, with our command line, it would keep a signal for itself. It remains one if
  # COMMAND has no #! line.
  while ((SECONDS < 2)) && cmp -s "/proc/$$/cmdline" "/proc/$pid/cmdline"; do :; done
  child=$pid
  for signal in $early; do pass_on "$signal"; done
  while true; do
    heard=$signals
    wait "$pid"
    status=$?
    ((heard != signals)) || break # no signal has interrupted it
    cancel_if_cancelled
  done
  ((status >= 0)) || status=255 # of a command that ends right as a signal arrives, bash 5.2 may lose the exit code
  child=''
}

# The failures in a row that earlier jobs of this chain, or earlier lives of this job, have noted.
earlier_failures() {
  failures=0
  if [[ -z $continues ]]; then
    rm -f -- "$flag.gave_up" # whoever starts the job anew wants to try again
    return
  fi
  local noted_step
  read_note failures
  failures=${REPLY:-0}
  read_note run
  run=${REPLY:-0}
  read_note step
  noted_step=$REPLY
  read_note event
  [[ $REPLY == start ]] || return 0
  # A run whose end is not there was cut off, by a node that failed or a time limit.
  read_member "$flag.progress" step
  [[ $REPLY != "$noted_step" ]] || failures=$((failures + 1))
}

end() { # EXIT_CODE RESULT REASON
  cancel_if_cancelled
  note end "$2" "$3"
  say "$3"
  exit "$1"
}

end_if_done() {
  if [[ -e $flag ]]; then
    cancel_continuation
    read_member "$flag" reason
    end 0 complete "training is complete: $flag ($REPLY)"
  fi
  if ((status == 93)) || [[ -e $flag.gave_up ]]; then
    cancel_continuation
    read_member "$flag.gave_up" reason
    end 93 "gave up" "gave up: ${REPLY:-the command ended with 93}"
  fi
  if ((status == 2 && failures)); then
    cancel_continuation
    end 2 failed "wrong usage: see the line of the command above"
  fi
  if [[ -n $stopped_by ]]; then
    local -A numbers=([HUP]=1 [INT]=2 [TERM]=15)
    cancel_if_cancelled
    end $((128 + numbers[$stopped_by])) stopped "stopped by SIG$stopped_by${continuation:+: job $continuation goes on from here}"
  fi
  if ((failures >= max_failures)); then
    cancel_continuation
    end $((status ? status : 1)) failed "$failures runs in a row reported no new checkpoint: giving up"
  fi
}

# Leave the next run to the next job.
hand_over() {
  if [[ $mode == requeue ]]; then
    note end unfinished "requeueing job $job"
    say "requeueing job $job"
    trap 'exit 0' TERM # which SLURM sends at once
    scontrol requeue "$job" && sleep 60 &
    wait $!
    trap 'stop TERM' TERM
    say "cannot requeue job $job: doing all runs in this job"
    mode=loop
  fi
  keep_continuation
  [[ -z $continuation ]] || end 0 unfinished "job $continuation goes on from here"
  [[ -z $handing_over ]] || end 0 unfinished "stopped as asked: run this again to go on"
}

main() {
  our_arguments=("$@")
  parse_arguments "$@"
  check_arguments
  if [[ -e $flag ]]; then
    say "nothing to run: training is complete, $flag exists; remove it to go on, and the checkpoints too to train anew"
    exit 0
  fi
  child='' early='' signals=0 stopped_by='' handing_over='' status=0 run=0 failures=0
  know_job
  if [[ -n $job ]] && grep -qz '/slurm_script$' "/proc/$PPID/cmdline"; then
    say "warning: signals end the job script, and do not arrive here: let it end with: exec ./autoresume.sh ..."
  fi
  [[ -z $earlier ]] || end_if_earlier_is_cancelled
  trap 'stop TERM' TERM
  trap 'stop INT' INT
  trap 'stop HUP' HUP
  trap 'user_signal USR1' USR1
  trap 'user_signal USR2' USR2
  keep_continuation
  take_lock
  earlier_failures
  export FAULT_TOL_FINISHED_FLAG_FILE=$flag

  local before
  [[ ! -t 0 ]] || exec </dev/null # to read from the terminal, in the background, would stop COMMAND for ever
  while true; do
    rm -f -- "$flag.stop" # it was meant for an earlier run
    end_if_done
    [[ -z $handing_over ]] || hand_over
    run=$((run + 1))
    say "run $run starts"
    note start running ''
    read_member "$flag.progress" step
    before=$REPLY
    SECONDS=0
    run_once 2>/dev/null # where bash says "Killed"
    say "run $run ended with exit code $status after $SECONDS s"
    [[ ! -e $flag ]] || end_if_done
    read_member "$flag.progress" step
    if [[ $REPLY != "$before" ]]; then
      failures=0
      say "a checkpoint of step $REPLY was saved"
    else
      failures=$((failures + 1))
      say "no new checkpoint was reported, $failures of $max_failures in a row"
    fi
    end_if_done
    [[ $status != 0 && -z $handing_over ]] || hand_over
    note end unfinished "exit code $status"
    [[ -n $continuation ]] || keep_continuation # SLURM may answer now
    ((status == 0)) || sleep 1
  done
}

main "$@"
