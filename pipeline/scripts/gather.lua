#!lua flags=allow-oom
-- gather: read what became of the members of a batch, in order.
-- ARGV[1] batch id  ARGV[2] first member (0..)  ARGV[3] at most (members)  ARGV[4] 'close' to end those who are lost
-- ARGV[5] life of a result whose batch is gone (ms)
-- Returns: 'gone' (there is no such batch), or: how the batch would be closed now, 'cancel' or '', how many were found
--   to be lost, then three values per member: id; its result, '' while it has none; 'queued' | 'running' | 'ended' |
--   'lost'. One that has ended without a result was counted, and what it said is no longer kept: the history knows it.
-- Invariant: a member that has neither result nor live record, and was never counted, is lost for good; with 'close' it
--   fails with that code, and is counted, as if it had ended by itself.
local now_us = clock_us()
local id, first = ARGV[1], tonumber(ARGV[2])
check_type(KEY.batch .. id, 'hash')
check_type(KEY.batch_done .. id, 'set')
check_type(KEY.events, 'stream')
check_type(KEY.delayed, 'zset')
local batch = read_batch(id)
if not batch then return {'gone'} end
local members = call('LRANGE', KEY.batch_members .. id, first, first + tonumber(ARGV[3]) - 1)
local answer, lost, names = {'', batch.cancel and 'cancel' or '', 0}, 0, {}
for i, member in ipairs(members) do names[i] = KEY.message .. member end
local results = #members > 0 and call('MGET', unpack(names)) or {}
for i, member in ipairs(members) do
  local result, state = results[i], 'ended'
  if not result then
    local live = call('HMGET', KEY.live .. member, 'stream', 'entry', 'attempts')
    if live[1] then
      state = live[2] ~= '' and pending(live[1], group_of(live[1]), live[2]) and 'running' or 'queued'
    elseif (ARGV[4] ~= 'close' or batch.closed) and call('SISMEMBER', KEY.batch_done .. id, member) == 1 then
      state = 'ended'
    else
      state = 'lost'
      if ARGV[4] == 'close' then
        local about = {tenant = batch.tenant}
        local text = ended(member, about, 'failed', 'lost', 'nothing is known of this message any more', now_us)
        count_member(member, id, text, ARGV[5], now_us)
        remember('message', member, batch.tenant, 10, now_us, text)
        result = call('GET', KEY.message .. member)
        lost = lost + 1
      end
    end
  end
  answer[#answer + 1] = member
  answer[#answer + 1] = result or ''
  answer[#answer + 1] = state
end
answer[1], answer[3] = read_batch(id).verdict, lost
conclude()
return answer
