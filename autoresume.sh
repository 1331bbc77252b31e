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
  printf '{"event": "%s", "run": %d, "job": "%s", "time": "%(%Y-%m-%dT%H:%M:%S%z)T", "step": "%s", "failures": %d, "continuation": "%s", "result": "%s", "reason": "%s"}\n' \
    "$1" "$run" "$job" -1 "$REPLY" "$failures" "$continuation" "$2" "${3//[\"\\]/}" >>"$flag.runs"
}

# What the last line of FLAG.runs says.
read_note() { # NAME
  REPLY=''
  [[ ! -e $flag.runs ]] || read_member <(tail -n 1 -- "$flag.runs") "$1"
}

# Never two runs of one job. The lock is COMMAND's too: it holds as long as either of us lives.
take_lock() {
  exec 9>>"$flag.lock"
  flock --nonblock 9 && return
  say "another run holds $flag.lock: waiting for it to end"
  flock --timeout 60 9 && return
  say "error: another run still holds $flag.lock: this one ends"
  exit 1
}

# -- SLURM

job_info() { # NAME
  scontrol show job --oneliner "$job" 2>/dev/null | sed -n 's/.* '"$1"'=\([^ ]*\).*/\1/p'
}

choose_mode() {
  job=${SLURM_JOB_ID:-}
  if [[ -z $job ]]; then
    mode=loop
  elif [[ $mode == auto ]]; then
    if type -P sbatch >/dev/null; then mode=chain; else mode=loop; fi
  fi
}

# Queue this job's script to start when this job has ended.
queue_continuation() {
  local old script=$flag.job words word rest=() options=() cleaned=() name
  read_note continuation
  old=$REPLY
  if [[ -n $old && $old != "$job" ]] && [[ $(squeue --noheader --jobs "$old" --format %T 2>/dev/null) == PENDING ]]; then
    continuation=$old # this job was requeued: what it had queued in its earlier life still waits for it
    return
  fi
  scontrol write batch_script "$job" "$script" >/dev/null || return
  # Command is the path of the job script and its arguments, with spaces between.
  read -r -a words <<<"$(scontrol show job --oneliner "$job" | sed -n 's/.* Command=\(.*\) WorkDir=.*/\1/p')"
  name=''
  for word in "${words[@]}"; do
    if [[ -n $name && -f $name ]]; then rest+=("$word"); else name=${name:+$name }$word; fi
  done
  options=(--dependency="afterany:${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}")
  [[ -n ${SLURM_ARRAY_JOB_ID:-} ]] || options=(--dependency="afterany:$job")
  options+=(--job-name="$SLURM_JOB_NAME" --partition="$(job_info Partition)" --nodes="$(job_info NumNodes)")
  options+=(--time="$(job_info TimeLimit)" --chdir="$PWD")
  for name in Account QOS; do
    word=$(job_info "$name")
    [[ -z $word || $word == "(null)" ]] || options+=("--$(tr '[:upper:]' '[:lower:]' <<<"$name")=$word")
  done
  [[ -z ${SLURM_ARRAY_TASK_ID:-} ]] || options+=(--array="$SLURM_ARRAY_TASK_ID")
  # The environment goes along, but what tells of this job would confuse srun in the next.
  for name in "${!SLURM_@}"; do
    [[ $name == SLURM_CONF ]] || cleaned+=(-u "$name")
  done
  continuation=$(env "${cleaned[@]}" FT_AUTORESUME_CONTINUES="$job" \
    sbatch --parsable "${options[@]}" "$script" ${rest[@]+"${rest[@]}"})
  continuation=${continuation%%;*}
}

cancel_continuation() {
  [[ -z $continuation ]] || scancel "$continuation"
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
  if [[ -n $continuation ]] && (is_cancelled); then
    say "the job was cancelled: cancelling its continuation $continuation"
    cancel_continuation
  fi
}

# scancel means that the job is not wanted any more; time limits, preemption and failing nodes send TERM too, but leave
# a reason.
is_cancelled() {
  [[ $(job_info JobState) =~ ^(COMPLETING|CANCELLED) && $(job_info Reason) == None && -z $(job_info PreemptTime) ]]
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
  # As long as it is a copy of this shell, with our command line, it would keep a signal for itself.
  while cmp -s "/proc/$$/cmdline" "/proc/$pid/cmdline"; do :; done
  child=$pid
  for signal in $early; do pass_on "$signal"; done
  while true; do
    heard=$signals
    wait "$pid"
    status=$?
    ((heard != signals)) || break # no signal has interrupted it
  done
  child=''
}

# The failures in a row that earlier jobs of this chain have noted.
earlier_failures() {
  failures=0
  [[ -n ${FT_AUTORESUME_CONTINUES:-} ]] || return 0
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
    end $((128 + numbers[$stopped_by])) stopped "stopped by SIG$stopped_by"
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
    scontrol requeue "$job" && sleep 60 & # until SLURM ends this script
    wait $!
    exit 0
  fi
  [[ -z $continuation ]] || end 0 unfinished "job $continuation goes on from here"
  [[ -z $handing_over ]] || end 0 unfinished "stopped as asked: run this again to go on"
}

main() {
  parse_arguments "$@"
  check_arguments
  if [[ -e $flag ]]; then
    say "nothing to run: training is complete, $flag exists; remove it to go on, and the checkpoints too to train anew"
    exit 0
  fi
  child='' early='' signals=0 stopped_by='' handing_over='' status=0 continuation='' run=0
  choose_mode
  trap 'stop TERM' TERM
  trap 'stop INT' INT
  trap 'stop HUP' HUP
  trap 'user_signal USR1' USR1
  trap 'user_signal USR2' USR2
  take_lock
  earlier_failures
  [[ -n ${FT_AUTORESUME_CONTINUES:-} ]] || rm -f -- "$flag.gave_up" # whoever starts the job anew wants to try again
  if [[ $mode == chain ]]; then
    queue_continuation
    if [[ -n $continuation ]]; then
      say "job $continuation is queued to go on when this job ends"
    else
      say "cannot queue a continuation: doing all runs in this job"
    fi
  fi
  unset FT_AUTORESUME_CONTINUES
  export FAULT_TOL_FINISHED_FLAG_FILE=$flag

  local before
  [[ ! -t 0 ]] || exec </dev/null # to read from the terminal, in the background, would stop COMMAND for ever
  end_if_done
  while true; do
    rm -f -- "$flag.stop" # it was meant for an earlier run
    [[ -z $handing_over ]] || hand_over
    run=$((run + 1))
    note start running ''
    say "run $run starts"
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
    ((status == 0)) || sleep 1
    end_if_done
  done
}

main "$@"
