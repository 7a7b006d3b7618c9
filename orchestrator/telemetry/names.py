"""Every span and attribute name we emit, in one place, because the GenAI conventions still move.

Names are those of the OpenTelemetry GenAI semantic conventions (repository semantic-conventions-genai) where they
have one. Both spellings of the cache-write count are sent: the convention is changing from the first to the
second, and viewers read either.
"""

OPERATION = "gen_ai.operation.name"
INVOKE_AGENT = "invoke_agent"
INVOKE_WORKFLOW = "invoke_workflow"
EXECUTE_TOOL = "execute_tool"

PROVIDER = "gen_ai.provider.name"
AGENT_NAME = "gen_ai.agent.name"
AGENT_ID = "gen_ai.agent.id"
AGENT_DESCRIPTION = "gen_ai.agent.description"
WORKFLOW_NAME = "gen_ai.workflow.name"
CONVERSATION_ID = "gen_ai.conversation.id"
REQUEST_MODEL = "gen_ai.request.model"
RESPONSE_MODEL = "gen_ai.response.model"
TOOL_NAME = "gen_ai.tool.name"
TOOL_CALL_ID = "gen_ai.tool.call.id"
TOOL_ARGUMENTS = "gen_ai.tool.call.arguments"
TOOL_RESULT = "gen_ai.tool.call.result"
INPUT_MESSAGES = "gen_ai.input.messages"
OUTPUT_MESSAGES = "gen_ai.output.messages"

# Input tokens include those read from and written to the cache; output tokens include thinking.
INPUT_TOKENS = "gen_ai.usage.input_tokens"
OUTPUT_TOKENS = "gen_ai.usage.output_tokens"
CACHE_READ_TOKENS = "gen_ai.usage.cache_read.input_tokens"
CACHE_CREATION_TOKENS = "gen_ai.usage.cache_creation.input_tokens"
CACHE_WRITE_TOKENS = "gen_ai.usage.cache_write.input_tokens"

ERROR_TYPE = "error.type"

# Ours: there is no convention for them yet.
RUN_ID = "orchestrator.run.id"
RUN_STATUS = "orchestrator.run.status"
RUN_COST = "orchestrator.run.cost_usd"
RUN_COST_BASIS = "orchestrator.run.cost_basis"
RUN_STEP = "orchestrator.run.step"
RUN_DEPTH = "orchestrator.run.depth"
SESSION_MODE = "orchestrator.session.mode"

# Metrics. The conventions are changing from one histogram of tokens to counters of each kind: both are sent.
TOKEN_USAGE = "gen_ai.client.token.usage"  # noqa: S105  # tokens of a model
TOKEN_TYPE = "gen_ai.token.type"  # noqa: S105
INPUT_TOKENS_USED = "gen_ai.client.inference.usage.input_tokens"
OUTPUT_TOKENS_USED = "gen_ai.client.inference.usage.output_tokens"
CACHE_READ_TOKENS_USED = "gen_ai.client.inference.usage.cache_read.input_tokens"
CACHE_WRITE_TOKENS_USED = "gen_ai.client.inference.usage.cache_write.input_tokens"
TOKEN_MODALITY = "gen_ai.token.modality"  # noqa: S105
AGENT_DURATION = "gen_ai.invoke_agent.duration"
WORKFLOW_DURATION = "gen_ai.invoke_workflow.duration"

RUNS = "orchestrator.runs"
COST = "orchestrator.cost"
POOL_HITS = "orchestrator.pool.hits"
POOL_SESSION_HITS = "orchestrator.pool.session_hits"
POOL_COLD_STARTS = "orchestrator.pool.cold_starts"
POOL_REFILLS = "orchestrator.pool.refills"
POOL_WAITS = "orchestrator.pool.waits"
POOL_REFUSED = "orchestrator.pool.refused"
POOL_RETIRED = "orchestrator.pool.retired"
POOL_PROCESSES = "orchestrator.pool.processes"
POOL_QUEUE = "orchestrator.pool.queue.length"
POOL_MEMORY = "orchestrator.pool.memory"
POOL_PHASE = "orchestrator.pool.phase"
POOL_REASON = "orchestrator.pool.reason"
