#!/usr/bin/env bash
# autoresume.sh: runs a training job again and again until it is complete.
#
#   ./autoresume.sh [--max-failures N] [--flag FILE] [--] COMMAND...
#   ./autoresume.sh python ft_launcher.py --nproc-per-node=4 --max-restarts=3 train.py
#
# Files (FLAG is --flag, else $FAULT_TOL_FINISHED_FLAG_FILE, else ./ft_finished.flag; exported to COMMAND)
#   FLAG           made by the job when training is complete; nothing is run while it exists
#   FLAG.progress  made anew by the job for each checkpoint that is on disk
#   FLAG.gave_up   made by the launcher when running again makes no sense, with the reason
#
# What a run is followed by
#   FLAG exists                        the end, exit code 0
#   FLAG.gave_up, or exit code 93      the end, exit code 93
#   TERM, INT or HUP had arrived       the end, exit code 128+N, after COMMAND, which got the signal too, has ended
#   FLAG.progress has changed          the next run
#   no progress, the Nth in a row      the end, with the exit code of COMMAND, or 1 where that is 0
#   no progress otherwise              the next run
#
# Exit code 2: wrong usage, nothing was run.
set -u
set -m # COMMAND gets a process group of its own, a stdin, and a SIGINT that is not ignored
exec 3>&2

say() { printf '[autoresume] %s\n' "$*" >&3; }

usage_error() {
  say "error: $*"
  exit 2
}

usage() { sed -n '2,/^set -u/{/^set -u/d;s/^# \{0,1\}//;p;}' "$0"; }

parse_arguments() {
  max_failures=3
  flag=${FAULT_TOL_FINISHED_FLAG_FILE:-ft_finished.flag}
  while (($#)); do
    case $1 in
      --max-failures | --flag)
        (($# > 1)) || usage_error "$1 needs a value"
        if [[ $1 == --flag ]]; then flag=$2; else max_failures=$2; fi
        shift 2
        ;;
      --max-failures=*) max_failures=${1#*=} && shift ;;
      --flag=*) flag=${1#*=} && shift ;;
      -h | --help) usage && exit 0 ;;
      --) shift && break ;;
      -*) usage_error "unknown option $1: expected --max-failures N, --flag FILE, or -- before the command" ;;
      *) break ;;
    esac
  done
  command=("$@")
}

check_arguments() {
  [[ $max_failures =~ ^[1-9][0-9]*$ ]] || usage_error "--max-failures: got '$max_failures', expected a number of at least 1"
  ((${#command[@]})) || usage_error "no command: give what is to be run, such as: python ft_launcher.py train.py"
  type -P -- "${command[0]}" >/dev/null || usage_error "command '${command[0]}' not found, or not executable: give its path"
  [[ -n $flag ]] || usage_error "--flag: got an empty name, expected a file"
  [[ $flag == /* ]] || flag=$PWD/$flag
  local directory
  directory=$(dirname -- "$flag")
  [[ -d $directory ]] || usage_error "the directory of the flag does not exist: create '$directory', or choose another --flag"
  [[ -w $directory ]] || usage_error "the directory of the flag is not writable: '$directory'"
  [[ ! -d $flag ]] || usage_error "the flag '$flag' is a directory: expected a file"
}

# The value of a member of one of the JSON files, which hold it in one line.
json_value() { # FILE NAME
  [[ -r $1 ]] && sed -n 's/.*"'"$2"'": *"\{0,1\}\([^",}]*\).*/\1/p' "$1"
}

progress() { cat -- "$flag.progress" 2>/dev/null; }

pass_on() { # SIGNAL
  if [[ -n $child ]]; then
    kill -s "$1" -- "-$child" 2>/dev/null
  fi
}

stop() { # SIGNAL
  stopped_by=$1
  say "got SIG$1: passing it on, waiting for the command to end, starting no other run"
  pass_on "$1"
}

# Run the command to its end; its exit code goes to $status.
run_once() {
  "${command[@]}" 3>&- &
  child=$!
  if [[ -n $stopped_by ]]; then
    pass_on "$stopped_by" # it arrived before there was a child to pass it on to
  fi
  # A trapped signal interrupts wait; the exit code can be asked for again afterwards.
  while wait "$child"; kill -0 "$child"; do :; done 2>/dev/null
  wait "$child" 2>/dev/null
  status=$?
  child=''
}

finish_if_done() {
  if [[ -e $flag ]]; then
    say "training is complete: $flag ($(json_value "$flag" reason))"
    exit 0
  fi
  if ((status == 93)) || [[ -e $flag.gave_up ]]; then
    say "gave up: $(json_value "$flag.gave_up" reason || echo "the command ended with 93")"
    exit 93
  fi
  if [[ -n $stopped_by ]]; then
    exit $((128 + $(kill -l "$stopped_by")))
  fi
}

main() {
  parse_arguments "$@"
  check_arguments
  if [[ -e $flag ]]; then
    say "nothing to run: training is complete, $flag exists; remove it to train anew"
    exit 0
  fi
  rm -f -- "$flag.gave_up" # of an earlier job: whoever starts this one wants to try again
  export FAULT_TOL_FINISHED_FLAG_FILE=$flag

  child='' stopped_by='' status=0
  trap 'stop TERM' TERM
  trap 'stop INT' INT
  trap 'stop HUP' HUP
  trap 'pass_on USR1' USR1
  trap 'pass_on USR2' USR2

  local failures=0 run before what
  for ((run = 1; ; run++)); do
    say "run $run starts"
    before=$(progress)
    SECONDS=0
    run_once
    what="run $run ended with exit code $status after $SECONDS s"
    say "$what"
    finish_if_done
    if [[ $(progress) != "$before" ]]; then
      failures=0
      say "a checkpoint of step $(json_value "$flag.progress" step) was saved: running again"
      continue
    fi
    failures=$((failures + 1))
    if ((failures >= max_failures)); then
      say "$failures runs in a row saved no checkpoint: giving up"
      exit $((status ? status : 1))
    fi
    say "no checkpoint was saved, $failures of $max_failures in a row: running again"
    sleep 1 & # so that signals are heard at once
    wait $!
    finish_if_done
  done
}

main "$@"
