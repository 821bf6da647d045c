#!lua flags=allow-oom
-- renew: keep a consumer's lease alive, and say what the consumer holds.
-- ARGV[1] consumer  ARGV[2] lease (ms)  ARGV[3] the worker's record (JSON)  ARGV[4] 'changed' when it is new, else ''
-- then pairs: stream, group
-- Returns: time (us), 'renewed' | 'taken' (there was no lease: first time, or lost), 'listed' | 'unlisted' (the list of
--   workers is of a wrong type), then per stream the list of {entry id, delivery count} pending for this consumer; the
--   word 'gone' where the group is gone.
-- Invariant: the lease says that the process lives; entry ownership says what it may still settle. Neither depends on
--   the list of workers, which is for people.
local now_us = clock_us()
local key = KEY.worker .. ARGV[1]
local held = call('PEXPIRE', key, ARGV[2])
if held == 0 or ARGV[4] == 'changed' then call('SET', key, ARGV[3], 'PX', ARGV[2]) end
local can_list = has_type(KEY.workers, 'zset')
if can_list then
  call('ZADD', KEY.workers, digits(now_us), ARGV[1])
  call('ZREMRANGEBYSCORE', KEY.workers, '-inf', digits(now_us - 3600 * 1000000)) -- gone for an hour
end
local answer = {digits(now_us), held == 1 and 'renewed' or 'taken', can_list and 'listed' or 'unlisted'}
for i = 5, #ARGV, 2 do
  local rows = redis.pcall('XPENDING', ARGV[i], ARGV[i + 1], '-', '+', 5000, ARGV[1])
  if rows.err then
    answer[#answer + 1] = 'gone'
  else
    local held_entries = {}
    for j, row in ipairs(rows) do held_entries[j] = {row[1], row[4]} end
    answer[#answer + 1] = held_entries
  end
end
return answer
