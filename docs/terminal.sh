#!/usr/bin/env bash
# The session that docs/terminal.svg shows, typed as a person would, in an environment with picogpt installed:
#   asciinema rec --overwrite --cols 100 --rows 34 -c docs/terminal.sh session.cast
#   npx svg-term-cli --in session.cast --out docs/terminal.svg --window --no-cursor
run() {
    printf '\e[1;32m$\e[0m '
    for ((i = 0; i < ${#1}; i++)); do
        printf '%s' "${1:i:1}"
        sleep 0.03
    done
    echo
    eval "$1"
    sleep "${2:-1.5}"
}
run "picogpt 'KING RICHARD:' --temperature 0.8 --top_p 0.95 --seed 4 --n_tokens_to_generate 78" 2
run "python -m picogpt.encoder ' unbelievable'" 2
run "python -m picogpt.verify shakespeare" 3
printf ' \b' # so that the last picture stays for a while
