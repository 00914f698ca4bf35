#!/usr/bin/env bash
# A Ray cluster on Linux machines that are reached by SSH, without anything else.
#
#   cluster.sh install HOSTS FOLDER              install a folder's wheels, with its constraints.txt, on every host
#   cluster.sh start HOSTS [DESTINATION...]      start Ray on the head, then on the others; or on these hosts alone
#   cluster.sh on-head HOSTS COMMAND [WORD...]   run a command on the head, with the cluster's programs and token
#   cluster.sh stop HOSTS [DESTINATION...]       end Ray, the head last; or on these hosts alone, after a notice
#
# HOSTS is a file with a line for each host, the head first: what `ssh` is to be given (a host of ~/.ssh/config, or
# user@host), and the IP address at which the other hosts reach it. The token is made in HOSTS.token; keep it secret.
set -euo pipefail

destinations=() addresses=()

fail() {
  echo "cluster.sh: $*" >&2
  exit 1
}

# ---- on a host: sent there as text, and run by the host's own bash ---------------------------------------------------

# The pid alone is not enough: after a reboot it may be anybody's.
ray_runs() {
  [[ -f ray.pid ]] && ps -o args= -p "$(cat ray.pid)" 2>/dev/null | grep -q 'ray start'
}

install_here() {
  cd ~/decentral
  [[ -x venv/bin/python ]] || python3 -m venv venv
  venv/bin/pip install --quiet --constraint dist/constraints.txt dist/*.whl
  venv/bin/pip install --quiet --no-deps --force-reinstall dist/*.whl # the same version may have other contents
}

start_here() { # address of this host, address of the head, token
  local role
  cd ~/decentral
  if ray_runs; then
    echo "$1: Ray runs already"
    return
  fi
  umask 077
  echo "$3" >token
  cat >environment <<END
export PATH="$PWD/venv/bin:\$PATH"
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="$PWD/token" RAY_ADDRESS=$2:6379 RAY_USAGE_STATS_ENABLED=0
END
  # shellcheck source=/dev/null
  source environment
  role=(--address="$2:6379")
  if [[ $1 == "$2" ]]; then
    unset RAY_ADDRESS
    role=(--head --port=6379 --ray-client-server-port=10001 --include-dashboard=false)
  fi
  # `--block`: only so does SIGTERM drain the node, and workers on it hear that it goes.
  PYTHONUNBUFFERED=1 nohup setsid venv/bin/ray start --block "${role[@]}" --node-ip-address="$1" \
    --node-manager-port=6380 --object-manager-port=6381 --runtime-env-agent-port=6382 --metrics-export-port=6383 \
    --dashboard-agent-listen-port=6384 --dashboard-agent-grpc-port=6385 \
    --min-worker-port=10002 --max-worker-port=10999 >ray.log 2>&1 </dev/null &
  echo $! >ray.pid
  for _ in {1..120}; do
    if grep -q 'Ray runtime started' ray.log; then
      echo "$1: Ray runs"
      return
    fi
    ray_runs || break
    sleep 0.5
  done
  echo "$1: Ray did not start; the end of ~/decentral/ray.log there:" >&2
  tail -n 15 ray.log >&2
  return 1
}

stop_here() { # address of this host
  cd ~/decentral
  if ! ray_runs; then
    echo "$1: no Ray of this cluster runs"
    return
  fi
  kill -TERM "$(cat ray.pid)"
  for _ in {1..90}; do # Ray drains for 30 s while there are workers on the node
    if ! ray_runs; then
      break
    fi
    sleep 0.5
  done
  pkill -KILL -s "$(cat ray.pid)" || true # all that `ray start` has started is in its session
  for _ in {1..100}; do # what is killed takes a moment to be gone, and to let go of its ports
    pgrep -s "$(cat ray.pid)" >/dev/null || break
    sleep 0.1
  done
  rm -f ray.pid
  echo "$1: Ray has ended"
}

# ---- here ------------------------------------------------------------------------------------------------------------

on() { # destination, function, its arguments; all of it goes through standard input, where `ps` shows nothing
  local destination=$1
  shift
  {
    echo 'set -euo pipefail'
    declare -f ray_runs install_here start_here stop_here
    printf '%q ' "$@"
    echo
  } | ssh "$destination" bash -s
}

on_others() { # function, arguments after the address; at once on all hosts but the head, if they are among the chosen
  local failed=0 jobs=() job i
  for ((i = 1; i < ${#destinations[@]}; i++)); do
    if chosen "${destinations[i]}"; then
      on "${destinations[i]}" "$1" "${addresses[i]}" "${@:2}" &
      jobs+=($!)
    fi
  done
  for job in ${jobs[@]+"${jobs[@]}"}; do
    wait "$job" || failed=1
  done
  return $failed
}

chosen() {
  local one
  ((${#only[@]})) || return 0
  for one in "${only[@]}"; do
    [[ $one == "$1" ]] && return 0
  done
  return 1
}

read_hosts() { # file
  local line words
  while read -r line; do
    [[ -z $line || $line == \#* ]] && continue
    read -r -a words <<<"$line"
    ((${#words[@]} == 2)) || fail "$1: '$line' is no destination and an address, such as: user@host 10.0.0.1"
    destinations+=("${words[0]}")
    addresses+=("${words[1]}")
  done <"$1"
  ((${#destinations[@]})) || fail "$1: there is no host in it; write a line such as: user@host 10.0.0.1"
}

token() { # the file it is kept in
  if [[ ! -s $1 ]]; then
    (umask 077 && openssl rand -hex 32 >"$1")
  fi
  cat "$1"
}

install_all() { # folder
  local destination
  [[ -f ${1-}/constraints.txt ]] || fail "install: name the folder with the wheels and constraints.txt, such as dist"
  for destination in "${destinations[@]}"; do
    tar -C "$1" -cf - . |
      ssh "$destination" 'rm -rf ~/decentral/dist && mkdir -p ~/decentral/dist && tar -C ~/decentral/dist -xf -'
    on "$destination" install_here
    echo "$destination: installed"
  done
}

[[ $# -ge 2 && -r $2 ]] || fail "usage: install|start|on-head|stop HOSTS ..., where HOSTS is a file that can be read"
command=$1 hosts=$2
shift 2
read_hosts "$hosts"
only=()
case $command in
start | stop)
  for each; do
    [[ " ${destinations[*]} " == *" $each "* ]] || fail "$each is not among the hosts in $hosts"
  done
  only=("$@")
  ;;
esac
case $command in
install) install_all "${1-}" ;;
start)
  if chosen "${destinations[0]}"; then
    on "${destinations[0]}" start_here "${addresses[0]}" "${addresses[0]}" "$(token "$hosts.token")"
  fi
  on_others start_here "${addresses[0]}" "$(token "$hosts.token")"
  ;;
on-head)
  terminal=()
  [[ ! -t 0 ]] || terminal=(-t) # so that Ctrl-C reaches the command
  # shellcheck disable=SC2029 # the words as they are here
  ssh ${terminal[@]+"${terminal[@]}"} "${destinations[0]}" "source ~/decentral/environment && $(printf '%q ' "$@")"
  ;;
stop)
  on_others stop_here
  if chosen "${destinations[0]}"; then
    on "${destinations[0]}" stop_here "${addresses[0]}"
  fi
  ;;
*) fail "'$command' is none of install, start, on-head, stop" ;;
esac
