#!lua
-- request: turn a back end's request for a report into a job, or refuse it; either way its entry goes.
-- ARGV[1] group  ARGV[2] consumer  ARGV[3] entry  ARGV[4] request id ('' none could be read)  ARGV[5] how long responses
--   are kept (ms)  ARGV[6] where a bridge wants the response ('' nowhere)  ARGV[7] 'accept' | 'refuse', and then
--   accept: job id, tail, stream, deadline_ms, record (see prelude), max live jobs, max events that wait to be recorded
--   refuse: response without its braces and its request, responses at most, dead letter ('' none), letters at most, their
--     greatest age (ms), the person it is about as keys name them ('' nobody that could be read)
-- Returns: time (us), 'accepted' | 'refused' | 'repeated' (its id is known: no second answer) | 'lost' (another's entry)
--   | 'overloaded' | 'backlog' (the entry stays), dead letters dropped.
-- Invariant: one job, or one refusal, per request id, for as long as its response is kept; no entry goes without either.
--   Where the response is wanted is known for as long.
local now_us = clock_us()
local group, consumer, entry, request, keep_ms, reply = ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5], ARGV[6]
local dropped = 0
local function answer(word) return {digits(now_us), word, dropped} end

if pending(KEY.report_requests, group, entry) ~= consumer then return answer('lost') end
check_type(KEY.report_counts, 'hash')
if request ~= '' and call('EXISTS', KEY.report_request .. request) == 1 then
  call('HINCRBY', KEY.report_counts, 'repeated', 1)
  remove(KEY.report_requests, group, entry)
  return answer('repeated')
end
check_type(KEY.report_responses, 'stream')
if ARGV[7] == 'accept' then
  local id, tail, stream, deadline_ms, record = ARGV[8], ARGV[9], ARGV[10], ARGV[11], ARGV[12]
  check_accept()
  check_type(stream, 'stream')
  check_type(KEY.events, 'stream')
  if call('ZCARD', KEY.live_index) >= tonumber(ARGV[13]) then return answer('overloaded') end
  if call('XLEN', KEY.events) >= tonumber(ARGV[14]) then return answer('backlog') end
  local more = {'deadline', deadline_ms}
  note_record(more, id, 'default', record, now_us)
  local known_ms = digits(tonumber(keep_ms) + math.max(0, tonumber(deadline_ms) - math.floor(now_us / 1000)))
  call('SET', KEY.report_request .. request, id, 'PX', known_ms)
  keep_reply(request, reply, known_ms)
  accept(id, tail, stream, 'default', deadline_ms, 0, now_us, more)
else
  local owner = ARGV[13]
  check_type(KEY.dead, 'stream')
  if owner ~= '' then check_type(KEY.user_data .. owner, 'zset') end
  if request ~= '' then
    local response = respond(request, ARGV[8], keep_ms, ARGV[9], now_us)
    keep_reply(request, reply, keep_ms)
    if owner ~= '' then keep_of_person(owner, 'response', response, tonumber(keep_ms), now_us) end
  end
  if ARGV[10] ~= '' then dropped = bury(ARGV[10], ARGV[11], tonumber(ARGV[12]), now_us) end
end
remove(KEY.report_requests, group, entry)
conclude()
return answer(ARGV[7] == 'accept' and 'accepted' or 'refused')
