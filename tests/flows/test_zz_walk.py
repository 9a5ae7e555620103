import pytest, sys, traceback, mlflow
from pathlib import Path
from balls import FAIR, GOOD
from cectflow.cli import main
def test_walk(register, lab, capsys, cubes):
    out = open('/tmp/h3x/walk.txt','w')
    def call(line):
        try:
            main(line if isinstance(line, list) else line.split()); code='none'
        except SystemExit as e: code=e.code
        except BaseException as e: code='TRACEBACK '+repr(e); traceback.print_exc()
        o=capsys.readouterr()
        out.write(f"$ {line}\n{o.out[:1500]}{('ERR: '+o.err[:1800]) if o.err else ''}[exit {code}]\n\n"); out.flush()
    call("models list")
    call("models list nobody"); call("models show cectflow-teacher"); call("models history cectflow-teacher"); call("models rollback cectflow-teacher"); call("models promote cectflow-teacher --to staging"); call("models doctor"); call("models doctor nobody")
    register(FAIR); register(GOOD); register(GOOD)
    call("models list"); call("models list cectflow-techer")
    for l in ("models show cectflow-teacher", "models show cectflow-teacher/9","models show cectflow-teacher@champion","models show ../x","models show cectflow-teacher/latest","models show",
      "models promote cectflow-teacher 9 --to staging","models promote cectflow-teacher x --to staging","models promote cectflow-teacher/2 3 --to staging","models promote cectflow-teacher --to prod","models promote cectflow-teacher --to archived","models promote nobody --to staging",
      "models promote cectflow-teacher --policy none.yaml","models promote cectflow-teacher --policy nosuch","models promote cectflow-teacher --dataset nowhere","models promote cectflow-teacher 1 --to production --force","models promote cectflow-teacher 1 --to production",
      "models rollback cectflow-teacher","models rollback cectflow-teacher --stage archived","models rollback cectflow-teacher/2","models archive cectflow-teacher/9 --reason x","models archive cectflow-teacher/2","models archive cectflow-teacher --reason x",
      "models promote cectflow-teacher 2 --to production","models promote cectflow-teacher 2 --to production","models promote cectflow-teacher 2 --to staging","models promote cectflow-teacher@production --to production","models promote cectflow-teacher 3 --to production","models history cectflow-teacher","models rollback cectflow-teacher","models rollback cectflow-teacher"):
        call(l)
    call(["models","archive","cectflow-teacher/3","--reason","misses apoferritin"])
    call("models promote cectflow-teacher 3 --to staging"); call("models list"); call("models history cectflow-teacher")
    call(["models","archive","cectflow-teacher/3","--reason","  "]); call(["models","archive","cectflow-teacher/3","--reason","again"])
    call(["models","archive","cectflow-teacher/3","--reason","again"])
    Path("p.yaml").write_text("role: teacher\nscore: accuracy\nrules:\n  - {figure: accurcy, at_least: 0.5, why: Because.}\n"); call("models promote cectflow-teacher 1 --policy p.yaml")
    Path("p.yaml").write_text("role: teacher\nscore: accuracy\nrule:\n  - {figure: accuracy, at_least: 0.5, why: Because.}\n"); call("models promote cectflow-teacher 1 --policy p.yaml")
    Path("p.yaml").write_text("role: teacher\nscore: accuracy\nrules:\n  - {figure: accuracy, at_leest: 0.5, why: Because.}\n"); call("models promote cectflow-teacher 1 --policy p.yaml")
    Path("p.yaml").write_text("role: teacher\nscore: [accuracy\n"); call("models promote cectflow-teacher 1 --policy p.yaml")
    Path("p.yaml").write_text("- x\n"); call("models promote cectflow-teacher 1 --policy p.yaml"); Path("p.yaml").write_bytes(b"\xff\xfe\x00"); call("models promote cectflow-teacher 1 --policy p.yaml"); Path("d").mkdir(); call("models promote cectflow-teacher 1 --policy d"); call("models promote cectflow-teacher 1 --dataset d")
    call("models show cectflow-teacher/1"); call("models doctor"); call("models diff cectflow-teacher/1 cectflow-teacher/9"); call("models lineage cectflow-teacher/1"); call("models pull cectflow-teacher/1 --to d"); call("models push d"); call("models push nothere.zip")
    call("models list --tracking-uri ./mlruns"); call("models list --tracking-uri http://127.0.0.1:9"); call("models list --tracking-uri sqlite:///nowhere/x.db"); call("models list --tracking-uri ftp://x")
    out.close()
