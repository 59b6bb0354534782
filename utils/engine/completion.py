"""What a shell needs to complete this program's arguments: `source <(python main.py --completion bash)`."""

import argparse

from utils.engine.help_config import keys

SCRIPT = """\
# Completes the arguments of `python main.py`, `torchrun ... main.py` and `./main.py`; other commands as before.
_mtdp() {
    local current=${COMP_WORDS[COMP_CWORD]} before=${COMP_WORDS[COMP_CWORD - 1]} line=" ${COMP_WORDS[*]} "
    COMPREPLY=()
    [[ $line == *" main.py "* || $line == *"/main.py "* ]] || return 0
    if [[ $before == "=" || $current == "=" ]]; then
        local key=${COMP_WORDS[COMP_CWORD - 2]}
        [[ $current == "=" ]] && key=$before && current=""
        case $key in
%(values)s
        esac
        return 0
    fi
    case $before in
%(flags)s
    esac
    if [[ $current == -* ]]; then
        COMPREPLY=($(compgen -W "%(names)s" -- "$current"))
    elif [[ -n $current ]]; then
        COMPREPLY=($(compgen -W "%(keys)s" -S = -- "$current"))
        compopt -o nospace 2>/dev/null
    fi
}
complete -o default -o bashdefault -F _mtdp python python3 torchrun main.py ./main.py
"""


def script(shell: str, parser: argparse.ArgumentParser) -> str:
    """The script for bash, or for zsh, which reads bash's."""
    flags = [action for action in parser._actions if action.option_strings and action.help != argparse.SUPPRESS]
    chosen = {" | ".join(action.option_strings): action.choices for action in flags if action.choices}
    known = keys()
    text = SCRIPT % {
        "values": _cases({key: values for key, values in known.items() if values}, " " * 12),
        "flags": _cases(chosen, " " * 8),
        "names": " ".join(name for action in flags for name in action.option_strings),
        "keys": " ".join(known)}
    return f"autoload -U +X bashcompinit && bashcompinit\n{text}" if shell == "zsh" else text


def _cases(words: dict, indent: str) -> str:
    return "\n".join(f'{indent}{name}) COMPREPLY=($(compgen -W "{" ".join(values)}" -- "$current")); return 0 ;;'
                     for name, values in words.items())
