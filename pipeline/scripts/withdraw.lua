#!lua flags=allow-oom
-- withdraw: answer a back end's request with an error although somebody may have it in hand; its entry goes.
-- ARGV[1] group  ARGV[2] entry  ARGV[3] request id ('' none could be read)  ARGV[4] how long responses are kept (ms)
-- ARGV[5] response without its braces and its request  ARGV[6] responses at most
-- Returns: 'withdrawn' | 'repeated' (its id is known: no second answer) | 'gone' (it was accepted or refused before).
-- Invariant: one job, or one refusal, per request id; who has the entry in hand finds that it is not theirs any more.
local group, entry, request = ARGV[1], ARGV[2], ARGV[3]
check_type(KEY.report_requests, 'stream')
check_type(KEY.report_responses, 'stream')
check_type(KEY.report_counts, 'hash')
local found = call('XRANGE', KEY.report_requests, entry, entry)[1]
if not found then return 'gone' end
local word = 'withdrawn'
if request ~= '' and call('EXISTS', KEY.report_request .. request) == 1 then
  call('HINCRBY', KEY.report_counts, 'repeated', 1)
  word = 'repeated'
elseif request ~= '' then
  respond(request, ARGV[5], ARGV[4], ARGV[6], clock_us())
  keep_reply(request, field_of(found[2], 'reply') or '', ARGV[4])
end
remove(KEY.report_requests, group, entry)
return word
