#!lua flags=allow-oom
-- unstage: take away members that were staged and never committed, the last ones first.
-- ARGV[1] at most (members)  ARGV[2] how long a staging may rest (ms)  ARGV[3] a batch whose gateway has given up, if any
-- Returns: time (us), members taken away.
-- Invariant: takes nothing of a batch that was committed; nothing of a staging that still grows. A commit finds that
--   members are missing from the first portion on that this takes; those that are left can be staged upon.
local now_us = clock_us()
local now_ms = math.floor(now_us / 1000)
if ARGV[3] then call('ZADD', KEY.staged, 'XX', 0, ARGV[3]) end
local old_ms = digits(now_ms - tonumber(ARGV[2]))
local batch = call('ZRANGEBYSCORE', KEY.staged, '-inf', old_ms, 'LIMIT', 0, 1)[1]
if not batch then return {digits(now_us), 0} end
local members, rows = KEY.batch_members .. batch, KEY.rows .. batch
if not (has_type(members, 'list') and has_type(rows, 'list')) then
  call('ZADD', KEY.staged, digits(now_ms), batch) -- a key of a wrong type: an operator must act, others pass
  return {digits(now_us), 0}
end
check_type(KEY.live_index, 'zset')
local ids = call('RPOP', members, ARGV[1]) or {}
call('RPOP', rows, ARGV[1])
for _, id in ipairs(ids) do
  call('DEL', KEY.live .. id)
  call('ZREM', KEY.live_index, id)
end
if call('EXISTS', members) == 0 then
  call('DEL', rows)
  call('ZREM', KEY.staged, batch)
end
return {digits(now_us), #ids}
