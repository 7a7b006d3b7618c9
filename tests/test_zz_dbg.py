from tests.test_mcp_tools import with_manager, manages, Rule, Task, delegate
async def test_dbg(runtime, project, model):
    model.rules = [*manages("helper", "a part of it"), Rule("the part")]
    async with with_manager(runtime, project, ) as rt0: pass
    from mcp_tools import open_door
    async with runtime(open_door=open_door, env={"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9", "OTEL_EXPORTER_OTLP_PROTOCOL": "http/json"}) as rt:
        outcome = await delegate(rt, Task(agent="manager", prompt="do it"))
        parent, child = await rt.store.tree(outcome.run_id)
        print(outcome.text, child.parent_span_id, parent.id)
